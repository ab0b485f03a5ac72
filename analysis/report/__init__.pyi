from .comparison import write_adaptation_page
from .report import write_report

__all__ = ["write_adaptation_page", "write_report"]
