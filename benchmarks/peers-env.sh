#!/bin/sh
# Makes the environment with the packages that publish SAEs, for the tests against what they compute themselves and for
# benchmarks/peers.py:
#   sh benchmarks/peers-env.sh DIR
# It takes torch and all else that they share with the project from the environment of python3 (the project's, active),
# and adds what peers-requirements.txt lists: half a gigabyte and a minute or two, without a second torch. Then:
#   PATCHSAE_PEERS_PYTHON=DIR/bin/python python -m pytest
#   python benchmarks/peers.py --peers-python DIR/bin/python ...
set -eu
if [ $# -ne 1 ]; then
    echo "usage: peers-env.sh DIR" >&2
    exit 2
fi
if ! shared=$(python3 -c 'import pathlib, torchvision; print(pathlib.Path(torchvision.__file__).parents[1])'); then
    echo "peers-env.sh: python3 has no torchvision. Activate the environment that the project is installed in." >&2
    exit 1
fi
python3 -m venv "$1"
own=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$shared" >"$own/project.pth" # these come after its own packages
"$1/bin/pip" install -qq --no-deps -r "$(dirname "$0")/peers-requirements.txt"
"$1/bin/python" - <<'EOF'
# A package that cannot be imported ends the script with its error.
from importlib.metadata import version

import clipscope, dictionary_learning.utils, overcomplete.sae, sae_lens, saev.nn, transformers, visaebench.hub.loader
import sparsify

names = "torch numpy transformers sae-lens dictionary-learning overcomplete saev eai-sparsify visaebench clipscope"
print("peers:", ", ".join(f"{name} {version(name)}" for name in names.split()))
EOF
