from .comparison import find_tables, write_adaptation_page
from .page import fill, share_pictures
from .report import draw_results, write_report
from .sections import SECTIONS
from .top_images import Frame, Shot, TopShots

__all__ = [
    "SECTIONS",
    "Frame",
    "Shot",
    "TopShots",
    "draw_results",
    "fill",
    "find_tables",
    "share_pictures",
    "write_adaptation_page",
    "write_report",
]
