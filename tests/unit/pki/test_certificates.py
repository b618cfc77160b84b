"""Certificates: minted to their profile, and judged against it by name."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509

from clawker_cp.pki import profiles
from clawker_cp.pki.certificates import is_due, load_identity, mint, new_key, problems, thumbprint

NOW = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)
CA = mint(profiles.CLI_CA, None, NOW)
ALL = [profiles.SERVER, profiles.CLI_CLIENT, profiles.CP_CLIENT, profiles.OTEL_SERVER, profiles.INFRA_CA,
       profiles.AGENTS_CA, profiles.AGENT, profiles.infra_client("cp")]  # fmt: skip


@pytest.mark.parametrize("profile", ALL, ids=lambda one: one.common_name)
def test_what_is_minted_has_its_profile(profile: profiles.Profile) -> None:
    """Names, purposes, constraints and times are those of the contract, and nothing is found wrong."""
    made = mint(profile, CA, NOW)
    assert list(problems(made.certificate, profile, CA.certificate, NOW)) == []
    assert made.certificate.not_valid_before_utc == NOW - dt.timedelta(minutes=5)
    assert made.certificate.not_valid_after_utc == NOW + profile.life
    serial = made.certificate.serial_number
    assert serial > 0 and serial.bit_length() <= 128
    usage = made.certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign is profile.is_authority
    kinds = {extension.oid for extension in made.certificate.extensions}
    assert (x509.BasicConstraints.oid in kinds) is profile.is_authority
    assert (x509.SubjectKeyIdentifier.oid in kinds) is profile.is_authority
    assert x509.AuthorityKeyIdentifier.oid in kinds


def test_a_leaf_below_an_intermediate_carries_it() -> None:
    """The file of such a leaf is leaf and intermediate; below the root it is the leaf alone."""
    infra = mint(profiles.INFRA_CA, CA, NOW)
    leaf = mint(profiles.infra_client("envoy"), infra, NOW)
    assert leaf.chain == (infra.certificate,) and leaf.certificate_pem.count(b"BEGIN CERTIFICATE") == 2
    assert mint(profiles.SERVER, CA, NOW).chain == ()
    again = load_identity(leaf.certificate_pem, leaf.key_pem)
    assert again.chain == leaf.chain and thumbprint(again.certificate) == thumbprint(leaf.certificate)


def test_an_agents_leaf_has_its_identities_in_order() -> None:
    """Agent first, then container, both as URIs, no DNS and no IP."""
    uris = ["urn:clawker:agent:clawker.shop.dev", "urn:clawker:container:abc"]
    leaf = mint(profiles.AGENT, CA, NOW, uris=uris)
    names = leaf.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == uris


def test_no_leaf_outlives_its_issuer() -> None:
    """Near the end of the CA leaves end with it."""
    late = NOW + profiles.CLI_CA.life - dt.timedelta(days=10)
    assert mint(profiles.SERVER, CA, late).certificate.not_valid_after_utc == CA.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("profile", "as_profile", "at", "said"),
    [
        (profiles.SERVER, profiles.CLI_CLIENT, NOW, "is for 'clawker-controlplane', not 'clawker-cli'"),
        (profiles.SERVER, profiles.CP_CLIENT, NOW, "lacks the purpose clientAuth"),
        (profiles.CP_CLIENT, profiles.SERVER, NOW, "lacks the names 127.0.0.1, clawker-controlplane, localhost"),
        (profiles.SERVER, profiles.SERVER, NOW + 2 * profiles.YEAR, "ended on 2027-11-24"),
        (profiles.SERVER, profiles.SERVER, NOW - dt.timedelta(days=1), "is not valid before 2026-11-23 23:55 UTC"),
        (profiles.INFRA_CA, profiles.SERVER, NOW, "is a certificate authority where a leaf belongs"),
        (profiles.SERVER, profiles.INFRA_CA, NOW, "is not a certificate authority"),
    ],
)
def test_what_does_not_fit_is_said(
    profile: profiles.Profile, as_profile: profiles.Profile, at: dt.datetime, said: str
) -> None:
    """Each difference has a sentence of its own."""
    made = mint(profile, CA, NOW)
    assert said in list(problems(made.certificate, as_profile, CA.certificate, at))


def test_a_leaf_of_another_ca_with_the_same_name_is_found_out() -> None:
    """The signature counts, not the issuer's name."""
    made = mint(profiles.SERVER, mint(profiles.CLI_CA, None, NOW), NOW)
    assert "was not issued by 'clawker CLI CA'" in list(
        problems(made.certificate, profiles.SERVER, CA.certificate, NOW)
    )


def test_due_is_thirty_days_before_the_end() -> None:
    """A day earlier it is not."""
    made = mint(profiles.SERVER, CA, NOW).certificate
    end = NOW + profiles.YEAR
    assert not is_due(made, profiles.SERVER, end - dt.timedelta(days=30))
    assert is_due(made, profiles.SERVER, end - dt.timedelta(days=30) + dt.timedelta(seconds=1))


def test_a_key_is_never_shown() -> None:
    """The pair's repr has no key, and a foreign key is refused without quoting it."""
    made = mint(profiles.SERVER, CA, NOW)
    assert "key" not in repr(made).replace("key_identifier", "") or "PRIVATE" not in repr(made)
    from clawker_cp.pki.certificates import key_pem

    with pytest.raises(ValueError, match="do not belong together"):
        load_identity(made.certificate_pem, key_pem(new_key()))
