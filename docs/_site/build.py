"""Build the documentation site of this version into a folder that holds several.

    python docs/_site/build.py SITE

makes SITE/<version>/ and renews SITE/versions.js, the list of the versions that are there, and SITE/index.html, which
leads to the newest. Older versions stay as they are; their pages read the list, too. Any web host can serve SITE, under
any path, and it works from the disk.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.version import Version

DOCS = Path(__file__).parents[1]
START = """<!doctype html>
<meta charset="utf-8">
<title>patchsae</title>
<meta http-equiv="refresh" content="0; url={version}/index.html">
<p><a href="{version}/index.html">The documentation of patchsae {version}</a></p>
"""


def build_site(site: Path) -> Path:
    """Build the pages of this version, and return their folder. Raises CalledProcessError for any warning."""
    version = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["version"]
    out = site / version
    if (out / "objects.inv").exists():  # nothing of an earlier build may stay
        shutil.rmtree(out)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", work, str(DOCS), str(out)]
        subprocess.run(command, check=True)
    (out / ".buildinfo").unlink(missing_ok=True)
    list_versions(site)
    return out


def list_versions(site: Path) -> None:
    """Write the list of the versions in a folder, oldest first, and the page that leads to the newest."""
    versions = sorted((found.parent.name for found in site.glob("*/objects.inv")), key=Version)
    (site / "versions.js").write_text(f"window.patchsaeVersions = {json.dumps(versions)};\n")
    (site / "index.html").write_text(START.format(version=versions[-1]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"Give the folder of the site: python {sys.argv[0]} SITE")
    try:
        print(f"{build_site(Path(sys.argv[1]))}/index.html")
    except subprocess.CalledProcessError as error:
        sys.exit(f"Sphinx found something wrong (exit code {error.returncode}); the lines above say what and where.")
