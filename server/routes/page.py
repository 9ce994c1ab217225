"""The page at / and the files that it loads; a key is asked for only by the routes that it calls."""

from importlib import resources
from types import MappingProxyType

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

router = APIRouter()

_HEADERS = {
    # Everything comes from this server, nothing is written into the page, and nobody frames it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _read_files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of every file but the page itself, by name."""
    folder = resources.files("anybit.server") / "web"
    files = {}
    for file in folder.iterdir():
        media_type = _MEDIA_TYPES.get(file.name[file.name.rfind(".") :])
        if media_type is not None:
            files[file.name] = file.read_bytes(), media_type
    return files


_PAGE = (resources.files("anybit.server") / "web/index.html").read_bytes()
_FILES = MappingProxyType(_read_files())

OPEN_PATHS = frozenset({"/", *(f"/page/{name}" for name in _FILES)})


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """A page for people who open the server's address: one prompt, several widths side by side."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(request: Request) -> Response:
    """A file that the page loads."""
    name: str = request.path_params["name"]
    if name not in _FILES:
        raise HTTPException(404)
    content, media_type = _FILES[name]
    return Response(content, headers=_HEADERS, media_type=media_type)
