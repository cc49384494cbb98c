"""The page on which one chats with a picture and a sound; everything on it comes from here."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mmkernels.models.trained import SAMPLES

STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".wav": "audio/wav",
}
# Nothing comes from elsewhere, and nobody shows the page within their own.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serves the page at /, its parts at /static/, and pictures and sounds to try at /samples/."""
    parts, samples = _read(STATIC), _read(SAMPLES)

    @app.get("/")
    async def index() -> Response:
        return _file(parts, "index.html")

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        return _file(parts, name)

    @app.get("/samples/{name}")
    async def sample(name: str) -> Response:
        return _file(samples, name)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in _TYPES}


def _file(files: dict[str, bytes], name: str) -> Response:
    if name not in files:
        raise HTTPException(404, f"there is no {name}")
    return Response(files[name], headers={**_HEADERS, "Content-Type": _TYPES[Path(name).suffix]})
