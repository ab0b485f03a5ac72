from .comparison import write_adaptation_page
from .page import fill, share_pictures
from .report import write_report
from .top_images import Frame

__all__ = ["Frame", "fill", "share_pictures", "write_adaptation_page", "write_report"]
