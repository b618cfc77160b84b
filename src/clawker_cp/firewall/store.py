"""
The two rules files on disk: reading, locking, writing, and what to do about faulty ones (7.9).

`egress-rules.yaml` holds global, permanent rules (another program reads it too),
`scoped-rules.yaml` everything else. Synchronous; the reconciler calls it through a thread and
holds the lock over one whole mutation.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from clawker_cp.errors import ClawkerError, DeadlineExceeded, InvalidInput
from clawker_cp.firewall.documents import MAX_DOCUMENT_BYTES, emit_rules
from clawker_cp.firewall.rule_file import RuleFile
from clawker_cp.firewall.rules import GLOBAL, Problem, Rule
from clawker_cp.firewall.salvage import Salvaged, salvage
from clawker_cp.runtime.durable import locked, sync_directory, write_durably

GLOBAL_FILE = "egress-rules.yaml"
SCOPED_FILE = "scoped-rules.yaml"
LOCK_TIMEOUT_S = 10.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stored:
    """
    What the files say.

    `rules` validate; `unreadable` names what makes the whole set unknown ("" = nothing). `skipped`
    are problems of rules left out; `closing` are the denials that stand in for those that deny;
    `close_wildcards`: a denial's `dst` was unusable, so no wildcard allow may stay.
    """

    rules: tuple[Rule, ...] = ()
    skipped: tuple[Problem, ...] = ()
    closing: tuple[Rule, ...] = ()
    close_wildcards: bool = False
    unreadable: str = ""
    digest: str = ""


def belongs_to_global_file(rule: Rule) -> bool:
    """Whether a rule is kept in the file that knows neither scopes nor expiry."""
    return rule.scope == GLOBAL and not rule.expires_at


def store_failure(what: str, cause: BaseException | None = None) -> ClawkerError:
    """Return the error of a rules file that cannot be read, locked or written; nothing was changed."""
    error = ClawkerError(f"{what}; no rule was changed", code="RULE_STORE_WRITE")
    error.__cause__ = cause
    return error


class _File:
    """One file with what was last read from or written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = RuleFile.parse("")
        self.salvaged = Salvaged()
        self.digest = ""
        self.unreadable = ""

    def read(self) -> bool:
        """Read the file if it is not what is known already; returns whether it was read."""
        try:
            data = self._data()
        except OSError as error:
            self.unreadable = f"{self.path} cannot be read: {error.strerror}"
            self.digest = ""
            return True
        digest = hashlib.sha256(data).hexdigest()
        if digest == self.digest:
            return False
        self.digest = digest
        self.unreadable = ""
        try:
            self.content = RuleFile.parse(data.decode())
        except UnicodeDecodeError:
            self.unreadable = f"{self.path} is not UTF-8 text"
        except InvalidInput as error:
            self.unreadable = f"{self.path}: {error.message}"
        self.salvaged = salvage([chunk.reading for chunk in self.content.chunks]) if not self.unreadable else Salvaged()
        return True

    def _data(self) -> bytes:
        try:
            if self.path.stat().st_size > MAX_DOCUMENT_BYTES:
                raise OSError(0, f"larger than {MAX_DOCUMENT_BYTES} bytes")
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def write(self, rules: Sequence[Rule]) -> bool:
        """Write the file if its rules differ; raises `OSError`."""
        if list(rules) == list(self.salvaged.rules):
            return False
        content = self.content.update(rules, kept=self.salvaged.faulty)
        data = content.text.encode()
        write_durably(self.path, data)
        self.content = content
        self.digest = hashlib.sha256(data).hexdigest()
        self.salvaged = salvage([chunk.reading for chunk in content.chunks])
        return True

    def start_over(self, stamp: str) -> None:
        """Keep an unreadable file under another name and begin an empty one."""
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(self.path.with_name(f"{self.path.name}.broken-{stamp}"))
            sync_directory(self.path.parent)
        data = emit_rules(()).encode()
        write_durably(self.path, data)
        self.content = RuleFile.parse(data.decode())
        self.salvaged = Salvaged()
        self.digest = hashlib.sha256(data).hexdigest()
        self.unreadable = ""


class RuleStore:
    """
    The rules of this host, on disk.

    One mutation is: `with store.lock(): stored = store.read(); ...; store.write(rules)`. Not
    thread-safe beyond its file lock: one caller at a time, as the action queue guarantees.
    """

    def __init__(self, directory: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._files = (_File(directory / GLOBAL_FILE), _File(directory / SCOPED_FILE))
        self._lock_timeout_s = lock_timeout_s
        self._stored: Stored | None = None
        self._held = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold both files' locks, in their order; raises `RULE_STORE_WRITE` after 10 s."""
        deadline = time.monotonic() + self._lock_timeout_s
        with contextlib.ExitStack() as stack:
            try:
                for file in self._files:
                    stack.enter_context(locked(file.path.with_name(file.path.name + ".lock"), deadline))
            except DeadlineExceeded as error:
                raise store_failure(error.message, error) from error
            except OSError as error:
                raise store_failure(f"the lock of the rules files cannot be taken: {error}", error) from error
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def read(self) -> Stored:
        """
        Return what the files say, reading those whose content is not what was last read or written.

        Never raises for a bad file: see `Stored`. A missing file is an empty set.
        """
        fresh = [file.read() for file in self._files]
        if self._stored is None or any(fresh):
            self._stored = self._gather()
            if self._stored.unreadable:
                log.error("rules_unreadable", cause=self._stored.unreadable)
            for problem in self._stored.skipped:
                log.warning("rule_skipped", dst=problem.dst, field=problem.field, problem=problem.text)
        return self._stored

    def _gather(self) -> Stored:
        unreadable = "; ".join(file.unreadable for file in self._files if file.unreadable)
        digest = "".join(file.digest for file in self._files)
        if unreadable:
            return Stored(unreadable=unreadable, digest=digest)
        salvaged = [file.salvaged for file in self._files]
        return Stored(
            rules=tuple(rule for one in salvaged for rule in one.rules),
            skipped=tuple(problem for one in salvaged for problem in one.problems),
            closing=tuple(rule for one in salvaged for rule in one.closing),
            close_wildcards=any(one.close_wildcards for one in salvaged),
            digest=digest,
        )

    def write(self, rules: Sequence[Rule]) -> bool:
        """
        Make these the stored rules; returns whether any file was written.

        Ephemeral rules do not belong here. Rules that could not be read stay in their file as they
        are. Raises `ClawkerError` (`RULE_STORE_WRITE`); then nothing was changed. A mutation first
        reads: writing over an unreadable file is refused.
        """
        stored = self.read()
        if stored.unreadable:
            raise store_failure(f"the rules are not readable ({stored.unreadable}): repair them and reload", None)
        shares = (
            [rule for rule in rules if belongs_to_global_file(rule)],
            [rule for rule in rules if not belongs_to_global_file(rule)],
        )
        old = self._files[0].content.text
        try:
            written = self._files[0].write(shares[0])
            try:
                written = self._files[1].write(shares[1]) or written
            except OSError:
                # One mutation may span both files: give the first one back what it had.
                write_durably(self._files[0].path, old.encode())
                self._files[0].digest = ""
                raise
        except OSError as error:
            raise store_failure(f"the rules could not be written: {error}", error) from error
        if written:
            self._stored = self._gather()
        return written

    def reset(self) -> tuple[Path, ...]:
        """
        Start unreadable files over, keeping each as `.broken-<time>`; returns those paths.

        The repair of `RemoveRule all`. Raises `ClawkerError` (`RULE_STORE_WRITE`).
        """
        self.read()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        broken = [file for file in self._files if file.unreadable]
        try:
            for file in broken:
                file.start_over(stamp)
        except OSError as error:
            raise store_failure(f"the broken rules file could not be replaced: {error}", error) from error
        self._stored = self._gather()
        return tuple(file.path.with_name(f"{file.path.name}.broken-{stamp}") for file in broken)
