from .encoding import encode
from .store import CodeStore, LatentCodes, RowCodes, ShardCodes

__all__ = ["CodeStore", "LatentCodes", "RowCodes", "ShardCodes", "encode"]
