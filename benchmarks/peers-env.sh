#!/bin/sh
# Makes the environment that benchmarks/peers.py times the peer packages in, apart from the project's own:
#   sh benchmarks/peers-env.sh DIR
# Then: python benchmarks/peers.py --peers-python DIR/bin/python ...
set -eu
if [ $# -ne 1 ]; then
    echo "usage: peers-env.sh DIR" >&2
    exit 2
fi
python3 -m venv "$1"
"$1/bin/pip" install --quiet --upgrade pip
"$1/bin/pip" install --quiet sae-lens overcomplete dictionary-learning "matplotlib<3.9" # overcomplete 0.3 calls what 3.9 removed
"$1/bin/pip" install --quiet --no-deps saev # its checkpoints only; what they need is there
"$1/bin/python" - <<'EOF'
from importlib.metadata import version

for name in ("torch", "numpy", "sae-lens", "overcomplete", "dictionary-learning", "saev", "matplotlib"):
    try:
        print(name, version(name))
    except Exception:
        print(name, "not installed")
EOF
