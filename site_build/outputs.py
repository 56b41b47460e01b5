"""The outputs of cells as they are kept: without what differs between machines and runs."""

import re

PROOF = "application/vnd.forward-pass.proof+json"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,16}\b")
RICH = {
    "image/png": "png",
    "image/svg+xml": "svg",
    "text/markdown": "markdown",
    "text/html": "html",
    "text/latex": "markdown",
    "text/plain": "text",
}


def normalize(outputs: list[dict], root: str) -> list[dict]:
    """A cell's notebook outputs, without what differs between machines and runs."""

    def clean(text) -> str:
        text = ANSI.sub("", "".join(text)).replace(root + "/", "").replace(root, ".")
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
        return ADDRESS.sub("0x…", text)

    normal = []
    for output in outputs:
        if output["output_type"] == "stream":
            normal.append({"kind": output["name"], "data": clean(output["text"])})
        elif data := output.get("data"):
            mime = next((mime for mime in RICH if mime in data), None)
            if PROOF in data:
                proof = {"kind": "proof", "data": clean(data["text/plain"]), "proof": data[PROOF]}
                normal.append(proof)
            elif mime:
                size = (output.get("metadata") or {}).get(mime, {})
                text = "".join(data[mime])
                text = text.replace("\n", "") if mime == "image/png" else clean(text)
                normal.append({"kind": RICH[mime], "data": text, "mime": mime} | dict(size))
    return normal
