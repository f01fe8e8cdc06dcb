"""Scripts and styles of browser pages, read from the Python packages that carry them (the extra `serve`)."""

import importlib.util
from pathlib import Path

INSTALL = 'pip install "dispec[serve]"'
SWAGGER_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui-standalone-preset.js": "text/javascript",
    "swagger-ui.css": "text/css",
}


def plotly_script() -> Path | None:
    """Return the path of Plotly's JavaScript, which draws the dashboard's charts; None if it is not installed."""
    package = _directory_of("plotly")
    path = package / "package_data" / "plotly.min.js" if package is not None else None
    return path if path is not None and path.is_file() else None


def swagger_directory() -> Path | None:
    """Return the directory of `SWAGGER_FILES`, which show the API at /docs; None if they are not installed."""
    package = _directory_of("swagger_ui")
    directory = package / "static" if package is not None else None
    has_all = directory is not None and all((directory / name).is_file() for name in SWAGGER_FILES)
    return directory if has_all else None


def missing_pages() -> str | None:
    """Return what lacks its scripts, as the subject of a sentence; None if everything is there."""
    lacking = {"the dashboard's charts": plotly_script(), "/docs": swagger_directory()}
    return " and ".join(page for page, found in lacking.items() if found is None) or None


def _directory_of(package: str) -> Path | None:
    """Return the directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None
