from .batches import read_batches
from .encoding import encode
from .entries import LatentCodes, RowCodes, ShardCodes
from .store import CodeStore

__all__ = ["CodeStore", "LatentCodes", "RowCodes", "ShardCodes", "encode", "read_batches"]
