"""Files of npm packages, for what an author makes once and commits: fonts, diagrams."""

import base64
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path


def read(package: str, integrity: str, names: list[str], build: Path) -> list[bytes]:
    """The files of the package, whose archive is fetched into `build` when it isn't there."""
    archive = build / f"{package.strip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not archive.is_file():
        build.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(build)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    data = archive.read_bytes()
    found = f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}"
    if found != integrity:
        raise SystemExit(f"{archive}: its hash is {found}, not {integrity}; delete it, try again")
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        return [files.extractfile(f"package/{name}").read() for name in names]
