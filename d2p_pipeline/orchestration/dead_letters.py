"""Dead letters in the UI: an asset that counts them, jobs that replay and discard them.

The work is in `d2p_pipeline.dead_letters`; here are its typed configuration and what the catalogue shows.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice

import dagster as dg
from pydantic import Field

from d2p_pipeline import wiring
from d2p_pipeline.dead_letters import Outcome, Selection, Stored, discard, replay, select
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.records.accept import acceptor

REASONS_SHOWN = 50
SAMPLES_SHOWN = 10
_SAMPLE_WIDTH = 200


class SelectionConfig(dg.Config):
    """Which dead letters; without anything, all."""

    keys: list[str] = Field(default=[], description="Of these keys; none: of all.")
    reason: str = Field(default="", description="Whose reason contains this text.")
    stage: str = Field(default="", description="Rejected at this stage: receive, parse or validate.")
    dry_run: bool = Field(default=False, description="Only say what would happen.")

    def selection(self) -> Selection:
        return Selection(keys=tuple(self.keys), reason=self.reason, stage=self.stage)


class ReplayConfig(SelectionConfig):
    """Which dead letters to replay, and what to mend before."""

    set_fields: dict[str, str] = Field(default={}, description="Fields set in every record first.")


@dg.asset(
    group_name="delivery",
    kinds={"redis"},
    description="Rejected records that wait for somebody: counts by key, stage and reason, and samples.",
)
def dead_letters(delivery_parts: DeliveryResource) -> dg.MaterializeResult:
    """Count the letters; fields that are hidden were hidden before they were stored."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for stored in select(delivery_parts.buffer, Selection()):
        group = groups.setdefault((stored.key, stored.letter.stage, stored.letter.reason), [0, 1 << 62, 0])
        received = stored.letter.received_at
        group[:] = [group[0] + 1, min(group[1], received), max(group[2], received)]
    largest = sorted(groups.items(), key=lambda group: -group[1][0])[:REASONS_SHOWN]
    return dg.MaterializeResult(
        metadata={
            "dead_letters": sum(count for count, _, _ in groups.values()),
            "keys": len({key for key, _, _ in groups}),
            "reasons": dg.MetadataValue.table(
                [
                    dg.TableRecord(
                        {
                            "key": key,
                            "stage": stage,
                            "reason": reason,
                            "letters": count,
                            "first": _moment(first),
                            "last": _moment(last),
                        }
                    )
                    for (key, stage, reason), (count, first, last) in largest
                ],
                schema=dg.TableSchema(
                    [
                        dg.TableColumn(name, "int" if name == "letters" else "string")
                        for name in ("key", "stage", "reason", "letters", "first", "last")
                    ]
                ),
            ),
            "samples": dg.MetadataValue.md(_samples(islice(select(delivery_parts.buffer, Selection()), SAMPLES_SHOWN))),
        }
    )


def _samples(letters: Iterable[Stored]) -> str:
    return "\n".join(
        f"- `{stored.key}`: {stored.letter.reason}\n\n      {stored.letter.raw[:_SAMPLE_WIDTH].decode(errors='replace')}"
        for stored in letters
    )


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


@dg.op
def replay_letters(context: dg.OpExecutionContext, config: ReplayConfig, delivery_parts: DeliveryResource) -> None:
    """Send the records again; those rejected again stay, with their history."""
    accept = acceptor(wiring.rules(delivery_parts.settings))

    def canonical(raw: bytes) -> tuple[str, bytes]:
        found = accept.canonical(raw)
        return found.key, found.line

    outcome = replay(delivery_parts.buffer, canonical, config.selection(), config.set_fields, dry_run=config.dry_run)
    _tell(context, outcome, config.dry_run)


@dg.op
def discard_letters(context: dg.OpExecutionContext, config: SelectionConfig, delivery_parts: DeliveryResource) -> None:
    """Throw the letters away for good."""
    _tell(context, discard(delivery_parts.buffer, config.selection(), dry_run=config.dry_run), config.dry_run)


def _tell(context: dg.OpExecutionContext, outcome: Outcome, dry_run: bool) -> None:
    figures = {"selected": outcome.selected, "replayed": outcome.replayed, "discarded": outcome.discarded}
    context.add_output_metadata({**figures, "rejected_again": outcome.rejected_again.total(), "dry_run": dry_run})
    context.log.info(f"{'would be: ' if dry_run else ''}{figures}")
    for reason, count in outcome.rejected_again.most_common(10):
        context.log.warning(f"{count} rejected again: {reason}")


@dg.job(
    executor_def=dg.in_process_executor,
    description="Sends dead letters again, on the way every record takes. Choose them and what to set in them in the launchpad.",
)
def replay_dead_letters() -> None:
    replay_letters()


@dg.job(
    executor_def=dg.in_process_executor,
    description="Throws dead letters away for good; they stay counted as discarded. Choose them in the launchpad.",
)
def discard_dead_letters() -> None:
    discard_letters()
