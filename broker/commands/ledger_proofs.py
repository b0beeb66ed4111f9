"""`energy-broker ledger checkpoint`, `prove`, `check-proof` and `evidence`: made from a ledger, checked without it."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker.commands.common import CHECKPOINT_FILE, DONE, FAILED, add_command, add_trust_option, counted, read_as
from broker.config import load_trust
from broker.ledger.certificate import Certificate, is_certificate
from broker.ledger.commit import CertifiedHeader
from broker.ledger.proofs import OperationsProof, Proof, read_proof
from broker.ledger.receipts import ProofFailed
from broker.ledger.trust import Trust, read_trust, trust_of
from broker.ledger.witness import Equivocation
from broker.protocol import envelope
from broker.protocol.command_line import shown, whole_number
from broker.protocol.messages import Checkpoint, Genesis
from firmware_config.loader import WrongValue

if TYPE_CHECKING:
    from broker.ledger.proving import Prover


_PROOF: Final = "a proof as `energy-broker ledger prove` writes it, or a certificate of `energy-broker ledger certify`"
_CERTIFICATE: Final = "a network's certificate as `energy-broker ledger certify` writes it"
_EVIDENCE: Final = "the evidence that a broker wrote when it stopped, `evidence-….cbor` beside its database"

_ANSWER_LIMIT_S: Final = 5.0
_COUNTED: Final = whole_number(0)
_CERTIFY_LIMIT_S: Final = 10.0
"""For a network that is at work; an idle one answers at once."""


def add_commands(group: Any) -> None:
    """Subcommands of this module's group."""
    checkpoint = add_command(
        group, "checkpoint", "Write the signed head of a ledger, to compare with others or later.", _checkpoint
    )
    checkpoint.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    checkpoint.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    prove = add_command(
        group, "prove", "Write a proof of operations, or that the ledger goes on from an earlier checkpoint.", _prove
    )
    prove.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    what = prove.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--operation", metavar="HEIGHT/INDEX", help="one operation: the block's height, and its place there from 0"
    )
    what.add_argument("--leaf", type=whole_number(0), metavar="N", help="one operation, by its place among all from 0")
    what.add_argument("--batch", metavar="ID", help="all operations of a batch, by its id in hex")
    what.add_argument("--since", type=Path, metavar="FILE", help="a checkpoint that was written earlier")
    prove.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the proof")
    check = add_command(
        group, "check-proof", "Check a proof with a trust file alone: exit 0 only if it holds.", _check_proof
    )
    check.add_argument("proof", type=Path, metavar="FILE", help="a proof, as `ledger prove` writes it")
    add_trust_option(check)
    check.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="a network's certificate of the proof's checkpoint, to check too",
    )
    check.add_argument("--json", action="store_true", help="print what is proven as JSON")
    certify = add_command(
        group, "certify", "Write a network's certificate of its last block, which `check-proof` checks.", _certify
    )
    certify.add_argument("--node", required=True, metavar="URL", help="RPC of a node of the network, http://HOST:PORT")
    add_trust_option(certify)
    certify.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    evidence = add_command(
        group, "evidence", "Check evidence against a ledger: exit 0 only if its validators cheated.", _evidence
    )
    evidence.add_argument("evidence", type=Path, metavar="FILE", help="the file that a broker wrote when it stopped")
    add_trust_option(evidence)


def _checkpoint(options: argparse.Namespace) -> int:
    with _prover(options.path) as (prover, _):
        options.out.write_bytes(prover.checkpoint)
    return DONE


def _prove(options: argparse.Namespace) -> int:
    older = read_as(options.since, CHECKPOINT_FILE, _checked) if options.since is not None else None
    batch_id = _hex(options.batch) if options.batch is not None else None
    place = _place(options.operation) if options.operation is not None else None
    with _prover(options.path) as (prover, trust):
        proof: Proof
        if older is not None:
            proof = prover.consistency_with(older)
        elif batch_id is not None:
            proof = prover.operations(prover.indices_of_batch(batch_id))
        elif place is not None:
            proof = prover.operations([prover.index_of(*place)])
        else:
            proof = prover.operations([options.leaf])
        # A damaged copy must not hand out what will not check elsewhere.
        proof.check(trust)
    options.out.write_bytes(proof.to_bytes())
    return DONE


def _check_proof(options: argparse.Namespace) -> int:
    trust = load_trust(options.trust)
    proof = read_as(options.proof, _PROOF, _read_proof)
    if isinstance(proof, Certificate):
        proven, verdict = _certified(proof, proof.check(trust))
        print(json.dumps(proven) if options.json else f"{options.proof}: {verdict}")
        return DONE
    if isinstance(proof, OperationsProof):
        checkpoint, validator = proof.check(trust)
        proven = _operations(proof, checkpoint, validator)
        count = len(proof.operations)
        verdict = (
            f"{counted(count, 'operation')} {'stands' if count == 1 else 'stand'} on ledger {trust.ledger}"
            f" at height {checkpoint.height},"
            f" block {checkpoint.block_id.hex()}, signed by {validator}"
        )
    else:
        older, newer = proof.check(trust)
        proven = {"older_height": older.height, "newer_height": newer.height, "root": newer.root.hex()}
        verdict = (
            f"height {newer.height} of ledger {trust.ledger} goes on from height {older.height}:"
            f" with what stood there unchanged, {counted(older.tree_size, 'operation')}"
        )
        checkpoint = newer
    if options.certificate is not None:
        certificate = read_as(options.certificate, _CERTIFICATE, Certificate.from_bytes)
        certified = _certified(certificate, certificate.check(trust))
        if certificate.block_id != checkpoint.block_id:
            raise ProofFailed(
                f"the certificate is of block {certificate.block_id.hex()}, and the proof ends in block"
                f" {checkpoint.block_id.hex()}; make both at one height"
            )
        proven["certified"], verdict = certified[0], f"{verdict}; {certified[1]}"
    print(json.dumps(proven) if options.json else f"{options.proof}: {verdict}")
    return DONE


def _certify(options: argparse.Namespace) -> int:
    from broker.ledger.cometbft.certify import certify
    from broker.ledger.cometbft.rpc import HttpNode, NodeError

    trust = load_trust(options.trust)
    try:
        node = HttpNode(options.node, _ANSWER_LIMIT_S)
    except WrongValue as error:
        raise WrongValue("--node", f"http://HOST:PORT, got {shown(options.node)}") from error
    try:
        certificate = certify(node, trust.ledger, _CERTIFY_LIMIT_S)
    except NodeError as error:
        print(f"energy-broker: ledger node {error}; check --node, and that the node runs", file=sys.stderr)
        return FAILED
    finally:
        node.close()
    certificate.check(trust)
    options.out.write_bytes(certificate.to_bytes())
    return DONE


def _certified(certificate: Certificate, header: CertifiedHeader) -> tuple[dict[str, Any], str]:
    """What a certificate that holds says, as JSON and as a sentence."""
    proven = {
        "block_id": certificate.block_id.hex(),
        "rows_digest": certificate.rows_digest.hex(),
        "network_height": header.height,
        "time_s": header.time_s,
        "signed_power": header.signed_power,
        "total_power": header.total_power,
    }
    return proven, (
        f"validators with a power of {header.signed_power} of {header.total_power} stand for block"
        f" {certificate.block_id.hex()} of ledger {certificate.ledger}, in block {header.height} of their network"
    )


def _evidence(options: argparse.Namespace) -> int:
    trust = load_trust(options.trust)
    for statement in read_as(options.evidence, _EVIDENCE, Equivocation.from_bytes).check(trust):
        print(
            f"{options.evidence}: {statement.signer} signed for height {statement.height} of ledger {trust.ledger}:"
            f" block {statement.block_id.hex()}, state {statement.state_hash.hex()}"
        )
    print(f"{options.evidence}: both cannot be true; the ledger has two histories, or a validator's key is used twice")
    return DONE


def _checked(raw: bytes) -> bytes:
    """The sealed checkpoint as it is, once it is known to be one."""
    Checkpoint.from_payload(envelope.parse(raw).payload)
    return raw


def _read_proof(raw: bytes) -> Proof | Certificate:
    return Certificate.from_bytes(raw) if is_certificate(raw) else read_proof(raw)


def _operations(proof: OperationsProof, checkpoint: Checkpoint, validator: str) -> dict[str, Any]:
    return {
        "height": checkpoint.height,
        "block_id": checkpoint.block_id.hex(),
        "root": checkpoint.root.hex(),
        "tree_size": checkpoint.tree_size,
        "validator": validator,
        "operations": [{"leaf": leaf, "operation": raw.hex()} for leaf, raw in proof.operations],
    }


@contextmanager
def _prover(path: Path) -> Iterator[tuple["Prover", Trust]]:
    """A prover over the ledger directory and what its own genesis says to trust; an engine may run on it meanwhile."""
    from broker.ledger.inspect import opened
    from broker.ledger.opening import charter_of
    from broker.ledger.proving import Prover
    from broker.ledger.rules.validators import validators_now

    with opened(path) as store:
        genesis = Genesis.from_bytes(store.meta("genesis") or b"")
        now = validators_now(store, charter_of(genesis))
        yield Prover(store, genesis.ledger), read_trust(json.dumps(trust_of(genesis, now)))


def _place(text: str) -> tuple[int, int]:
    height, _, number = text.partition("/")
    try:
        return _COUNTED(height), _COUNTED(number)
    except argparse.ArgumentTypeError:
        raise WrongValue("--operation", f"HEIGHT/INDEX, for example 12/0, got {shown(text)}") from None


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise WrongValue("--batch", f"a batch's id in hex, got {shown(text)}") from None
