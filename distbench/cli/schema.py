"""`distbench schema`: JSON Schemas of the files that distbench reads and writes."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.report.terminal import print_json

_DOCUMENTS = ("case", "suite", "report")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "schema",
        description="Print the JSON Schema of a case file, a suite file or report.json, for editors and readers.",
    )
    command.add_argument("document", metavar="|".join(_DOCUMENTS), choices=_DOCUMENTS, help="the kind of document")
    command.set_defaults(command=_schema)


def _schema(options: argparse.Namespace) -> int:
    from distbench.case.json_schema import case_schema, suite_schema

    made = {"case": case_schema, "suite": suite_schema, "report": _report_schema}
    print_json(made[options.document]())
    return 0


def _report_schema() -> dict[str, Any]:
    import msgspec

    from distbench.report.schema import Report

    return msgspec.json.schema(Report)
