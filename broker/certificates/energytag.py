"""A certificate's lines as granular certificate bundles, as registries of EnergyTag's scheme know them. Pure.

One bundle for each slice. The names of the entries are those of the open implementation of EnergyTag's standard
(https://github.com/Future-Energy-Associates/granular_certificate_registry, bundles and issuance metadata). A granular
certificate stands for 1 Wh; its ids count the Wh of what the device made in that interval, from 0, both ends included,
so a split changes none of them and two parts cannot overlap.

A bundle's status is *Claimed*: the consumer used it. What a ledger does not know (storage, support received, a legal
status, coordinates) is null, or says so.
"""

from typing import Any, Final

from broker.certificates.codes import EECS_CODES
from broker.certificates.contents import Contents, Line, utc_text

_DATE: Final = len("2026-01-31")
_LONGEST_WINDOW_S: Final = 31 * 86_400
"""What nobody used within this and the correction deadline expires (docs/ledger.md)."""


def bundles(contents: Contents, certificate_id: bytes) -> dict[str, Any]:
    """The whole certificate as JSON knows it: what all bundles have in common, and the bundles."""
    certificate, genesis = contents.certificate, contents.genesis
    return {
        "scheme": "EnergyTag granular certificates",
        "certificate_id": certificate_id.hex(),
        "beneficiary": certificate.meter,
        "consumption_period_start": utc_text(certificate.from_s),
        "consumption_period_end": utc_text(certificate.to_s),
        "is_provisional": contents.is_provisional,
        "issuance_metadata": {
            "issuing_body": certificate.broker,
            "country_of_issuance": None,
            "connected_grid_identification": genesis.ledger,
            "legal_status": None,
            "issuance_purpose": "Disclosure",
            "support_received": None,
            "quality_scheme_reference": None,
            "dissemination_level": None,
            "issue_datestamp": utc_text(certificate.issued_s)[:_DATE],
            "emissions_factor_source": certificate.factors_source,
        },
        "granular_certificate_bundles": [_bundle(contents, line) for line in contents.lines],
    }


def _bundle(contents: Contents, line: Line) -> dict[str, Any]:
    admission = contents.devices[line.device].admission
    asset = contents.assets[line.issue]
    code = EECS_CODES[admission.source]
    factors = dict(contents.certificate.factors)
    made_end_s = line.made_s + contents.genesis.interval_s
    expires_s = line.made_s + _LONGEST_WINDOW_S + contents.genesis.correction_deadline_s
    return {
        "issuance_id": f"{asset.device}/{asset.carrier.name.lower()}/{utc_text(line.made_s)}",
        "certificate_status": "Claimed",
        "account_id": contents.certificate.meter,
        "bundle_id_range_start": line.from_wh,
        "bundle_id_range_end": line.to_wh - 1,
        "bundle_quantity": line.energy_wh,
        "face_value": 1,
        "energy_carrier": asset.carrier.name.capitalize(),
        "energy_source": admission.source.label,
        "energy_source_code": code.fuel,
        "device_technology_code": code.technology,
        "issuance_post_energy_carrier_conversion": False,
        "device_id": asset.device,
        "device_name": asset.device,
        "device_owner": admission.owner,
        "device_type": "production",
        "device_capacity": admission.capacity_w,
        "device_location": admission.place,
        "device_production_start_date": utc_text(admission.commissioned_s),
        "issue_market_zone": admission.area,
        "production_starting_interval": utc_text(line.made_s),
        "production_ending_interval": utc_text(made_end_s),
        "consumption_starting_interval": utc_text(line.start_s),
        "consumption_ending_interval": utc_text(line.start_s + contents.genesis.interval_s),
        "expiry_datestamp": utc_text(expires_s)[:_DATE],
        "is_storage": False,
        "sdr_allocation_id": None,
        "emissions_factor_production_device_mg_per_kwh": factors.get(int(admission.source)),
    }
