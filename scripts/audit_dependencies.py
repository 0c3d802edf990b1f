"""Known vulnerabilities, licences and a list (SBOM) of what is installed; says so where its data cannot be reached.

    python scripts/audit_dependencies.py [SBOM.json]

Exit code 0: nothing known; 1: a vulnerability, or a licence that does not go with Apache-2.0; 3: vulnerabilities could
not be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

# Words of licences that would oblige who ships pairtune; weak copyleft (LGPL, MPL) does not.
_STRONG = ("GPL", "AGPL", "SSPL", "BUSL")
_WEAK = ("LGPL", "LESSER", "MPL")
_FEW = 5  # packages of one's own, which no index knows


def licence_of(package: object) -> str:
    """What a distribution says of its licence, or of its classifiers; empty if nothing."""
    about = package.metadata  # type: ignore[attr-defined]
    said = about.get("License-Expression") or about.get("License") or ""
    classified = [each.split(" :: ")[-1] for each in about.get_all("Classifier") or [] if each.startswith("License")]
    return said.splitlines()[0].strip() if said and len(said) < 200 else ", ".join(classified)


def vulnerabilities() -> tuple[int, str]:
    """Exit code and report of pip-audit; 3 if its data cannot be reached."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--skip-editable", "--timeout", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    unknown = done.stdout.count("could not be audited")
    if unknown > _FEW:  # an index without PyPI's data answers, and knows nothing
        return 3, f"{unknown} packages are not known where this looks"
    if done.returncode and "Found" not in done.stderr:
        return 3, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer"
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """Look at everything, and print what was found."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "sbom.json")
    command = [sys.executable, "-m", "cyclonedx_py", "environment", sys.executable, "--of", "JSON", "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    parts = json.loads(target.read_text(encoding="utf-8")).get("components", [])
    print(f"{target}: {len(parts)} components")
    worst = 0
    for package in sorted(distributions(), key=lambda each: each.metadata["Name"].lower()):
        licence = licence_of(package)
        upper = licence.upper()
        if not licence:
            print(f"{package.metadata['Name']}: states no licence")
        elif any(word in upper for word in _STRONG) and not any(word in upper for word in _WEAK):
            print(f"{package.metadata['Name']}: {licence}")
            worst = 1
    code, said = vulnerabilities()
    print("vulnerabilities could not be looked up: " + said if code == 3 else said)
    return worst or code


if __name__ == "__main__":
    sys.exit(main())
