"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[
    Path,
    typer.Option(
        "--file", "-f", help="Deployment file.", show_default="deployment.yaml of the checkout"
    ),
]
Only = Annotated[
    str | None,
    typer.Option("--server", help="Only this server of the deployment.", show_default="all"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
