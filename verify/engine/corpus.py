"""The corpus: cases that once broke a law, kept as lines of text, tried before any is drawn. Data:
nothing in it is run.
"""

from __future__ import annotations

from pathlib import Path

from verify.errors import VerifyError
from verify.spec.case import Case


class Corpus:
    """A file of lines `kernel <tab> property <tab> case`. A line that does not parse, of another
    version say, is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = (
            dict.fromkeys(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else {}
        )

    def cases(self, kernel: str, law: str) -> list[Case]:
        """What broke this law for this kernel, oldest first."""
        found = []
        for line in self._lines:
            name, _, rest = line.partition("\t")
            of, _, text = rest.partition("\t")
            if (name, of) == (kernel, law):
                try:
                    found.append(Case.parse(text))
                except VerifyError:
                    continue
        return found

    def add(self, kernel: str, law: str, case: Case) -> None:
        """Append a case, once. Raises VerifyError where the file cannot be written."""
        line = f"{kernel}\t{law}\t{case}"
        if line in self._lines:
            return
        self._lines[line] = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise VerifyError(
                f"corpus {self.path}: {error.strerror}; name a file that can be written"
            ) from error
