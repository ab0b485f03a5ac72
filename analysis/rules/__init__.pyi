from .learning import learn_rules

__all__ = ["learn_rules"]
