from .looking import look
from .view import Look, View

__all__ = ["Look", "View", "look"]
