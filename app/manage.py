#!/usr/bin/env python
"""Django's command line for the site: `python manage.py runserver` starts it on localhost:8000."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
    # The runs folder is next to this one, whatever the working directory.
    os.environ.setdefault("PAIRTUNE_RUNS", str(Path(__file__).resolve().parents[1] / "runs"))
    execute_from_command_line(sys.argv)
