"""Lighthouse's four scores of the built site, on its simulated phone, over a server with gzip.

The performance of a page is the median of the rounds; what keeps a score from 100 is listed.
"""

import json
import os
import statistics
import subprocess
from pathlib import Path

from tests.browser import FLAGS, Zipped, executable, served

VERSION = "12.8.2"  # 13 wants Node 22
PAGES = {
    "landing": "index.html",
    "Markdown": "attention/gqa.html",
    "notebook": "position/comparison.html",
    "API": "reference/api/attention.html",
    "calculator": "reference/calculators.html",
}
WANTED = {"performance": 95, "accessibility": 100, "best-practices": 100, "seo": 100}


def scores(rounds: int):
    """Yields page, the least or median score of each kind, and what was found wanting."""
    program = installed(Path("build/lighthouse"))
    with served(Path("site"), Zipped) as base:
        for kind, page in PAGES.items():
            if not Path("site", page).is_file():
                continue
            reports = [run(program, base + page) for _ in range(rounds)]
            found = {
                name: statistics.median(100 * r["categories"][name]["score"] for r in reports)
                for name in WANTED
            }
            yield f"{kind}, {page}", found, sorted(set(map(str, wanting(reports))))


def installed(folder: Path) -> Path:
    program = folder / "node_modules/.bin/lighthouse"
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", folder]
        subprocess.run([*command, f"lighthouse@{VERSION}"], check=True)
    return program


def run(program: Path, address: str) -> dict:
    command = [str(program), address, "--quiet", "--output=json"]
    command += [f"--chrome-flags=--headless=new {' '.join(FLAGS)}"]
    environment = os.environ | {"CHROME_PATH": executable()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{address}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def wanting(reports: list[dict]):
    """The audits with a weight that some report gave less than all."""
    for report in reports:
        for name, category in report["categories"].items():
            for part in category["auditRefs"]:
                audit = report["audits"][part["id"]]
                if part["weight"] and audit["score"] not in (None, 1):
                    value = audit.get("displayValue") or ""
                    yield f"{name}: {audit['title']} {value}".strip()
