from .recovery import Labeled, Recovered, recover_concepts
from .scores import localize

__all__ = ["Labeled", "Recovered", "localize", "recover_concepts"]
