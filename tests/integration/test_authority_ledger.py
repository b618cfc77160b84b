"""What the token authority may not forget, whichever threads write it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from clawker_cp.agents.database import Database
from clawker_cp.auth.authority import ledger
from clawker_cp.auth.authority.service import TokenAuthority
from clawker_cp.auth.hydra import BarList


def embedded(kept: ledger.Ledger) -> TokenAuthority:
    key = ec.generate_private_key(ec.SECP256R1())
    return TokenAuthority(key, "kid", kept, issuer="https://localhost/", audience="https://localhost/token")


def test_spent_numbers_are_forgotten_when_their_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then, so that the table does not grow; one whose assertion is over can harm nobody."""
    monkeypatch.setattr(ledger, "SWEEP_EVERY", 2)
    database = Database(tmp_path / "cp.db")
    database.open()
    try:
        kept = ledger.Ledger(database)
        assert kept.spend("early", "c", 100, 50.0) and not kept.spend("early", "c", 100, 60.0)
        assert kept.spend("other", "c", 900, 200.0) and kept.spend("later", "c", 900, 200.0)
        assert [row[0] for row in database.query("SELECT jti FROM oauth_jti ORDER BY jti")] == ["later", "other"]
    finally:
        database.close()


def test_a_revocation_is_not_lost_to_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to an earlier one that is written later, nor to a sweep that is under way."""
    monkeypatch.setattr(ledger, "SWEEP_EVERY", 1)
    database = Database(tmp_path / "cp.db")
    database.open()
    try:
        kept, again = ledger.Ledger(database), ledger.Ledger(database)
        kept.bar("client", "c", 101, 900)
        kept.bar("client", "c", 100, 899)
        barring = threading.Thread(target=kept.bar, args=("client", "c", 200, 950))

        class Now(float):
            """Between two rows of the sweep somebody revokes."""

            def __sub__(self, other: float) -> float:
                if barring.ident is None:
                    barring.start()
                    barring.join(0.2)  # as far as it gets
                return float(self) - other

        again.load(50.0)
        assert again.barred_until("c") == 101
        kept.spend("jti", "c", 900, Now(50.0))
        barring.join()
        assert kept.is_barred(jti="", digest="", client_id="c", iat=200)
    finally:
        database.close()


@pytest.mark.parametrize("made", [embedded, BarList], ids=["embedded", "hydra"])
async def test_a_revocation_given_up_ends_when_it_is_written(
    tmp_path: Path, made: Callable[[ledger.Ledger], TokenAuthority | BarList]
) -> None:
    """Whoever empties caches after it finds the token barred: no thread writes on behind them."""
    database = Database(tmp_path / "cp.db")
    database.open()
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with database.transaction():
            locked.set()
            release.wait(20)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        assert locked.wait(20)
        kept = ledger.Ledger(database)
        barring = asyncio.create_task(made(kept).bar("digest", "ab" * 32))
        await asyncio.sleep(0)
        barring.cancel()
        await asyncio.wait([barring], timeout=0.2)  # as far as it gets
        assert not barring.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await barring
        assert kept.is_barred(jti="", digest="ab" * 32, client_id="c", iat=0)
    finally:
        release.set()
        holding.join(20)
        database.close()
