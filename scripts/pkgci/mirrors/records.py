"""What is known about a mirror, on our side: `mirrors/RELEASE/CODENAME/NAME.json` in the data directory."""

from datetime import datetime

from pkgci.artifacts import Part, Record


class Kept(Part):
    """A generation that a mirror has, or has a part of.

    `replaced` is when its readers were led to another one, or when it was sent, for one that they were never led to;
    None while the mirror's pointer leads to it. `files` are its metadata files that it shares with others; none when they are
    not known, which is so when nobody here remembers that it was sent.
    """

    number: int
    replaced: datetime | None
    files: tuple[str, ...]


class State(Record):
    """What the last run left on a mirror.

    `generation` is where its pointer leads to, 0 before the first; `prepared` is one that is there as a whole too, and
    that a killed run may have led it to. A mirror whose pointer leads anywhere else is not as we left it. `whole` is when all
    that it has to have was last gone through, None while that is still to be done; `settled`, that nothing has failed or was
    cut short since.
    """

    generation: int = 0
    prepared: int = 0
    settled: bool = False
    whole: datetime | None = None
    synced: datetime | None = None
    kept: tuple[Kept, ...] = ()

    def known(self, number: int) -> bool:
        """Return whether the mirror has all of a generation."""
        return number in (self.generation, self.prepared) and any(one.number == number for one in self.kept)

    def sending(self, number: int, files: tuple[str, ...], now: datetime) -> "State":
        """Return the state in which a part of a generation may be there."""
        others = tuple(one for one in self.kept if one.number != number)
        replaced = None if number == self.generation else now
        kept = (*others, Kept(number=number, replaced=replaced, files=files))
        return self.model_copy(update={"kept": kept, "settled": False})

    def switched(self, number: int, prepared: int, now: datetime) -> "State":
        """Return the state in which the pointer leads to a generation, and another one may be there as a whole too."""
        # its readers may have been there until now
        left = {self.generation, self.prepared, prepared}
        kept = tuple(
            one.model_copy(
                update={
                    "replaced": None if one.number == number else now if one.number in left else one.replaced or now
                }
            )
            for one in self.kept
        )
        known = {"generation": number, "prepared": prepared, "settled": not prepared}
        return self.model_copy(update={**known, "synced": now, "kept": kept})
