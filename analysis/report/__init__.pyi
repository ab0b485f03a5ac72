from .comparison import write_adaptation_page
from .page import fill, share_pictures
from .report import write_report

__all__ = ["fill", "share_pictures", "write_adaptation_page", "write_report"]
