"""The explorer: concepts to look at in a browser, by a small server or as a folder of files for any web host.

The page (`page/`, built from `web/`) asks for relative URLs under `data/`; the functions here make what it gets, so the
server and the files give the same bytes. The door; `__init__.pyi` lists what other sub-packages may use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
