"""The pages of sequences: how many they need, what they share, what stays pinned."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from turret_adapters.spec import AdapterSpec
from turret_server.engine.kv.pages import PagePool
from turret_server.engine.kv.prefix_cache import PrefixCache
from turret_server.engine.residency.residency import Residency
from turret_server.engine.residency.resident import Resident
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import PageCopy
from turret_server.errors import AdapterTooLargeError, QuotaExceededError, RequestTooLargeError

# The share of the arena that pinned prompts and adapters may take; the rest is for requests.
_MAX_PINNED_SHARE = 0.5


class Allocation:
    """Gives sequences the pages of their keys and values, and shares blocks that are computed already.

    A pinned prompt is a sequence that has ended and keeps its whole blocks and its adapters. If attention is
    `bidirectional`, the keys and values of a token depend on later ones, and no blocks are shared.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache,
        residency: Residency,
        block_size: int,
        *,
        bidirectional: bool = False,
    ) -> None:
        self.bidirectional = bidirectional
        self._pool = pool
        self._cache = cache
        self._residency = residency
        self.block_size = block_size
        # By request id.
        self._pinned: dict[int, Sequence] = {}

    @property
    def pinned_prompts(self) -> Iterator[Sequence]:
        yield from self._pinned.values()

    @property
    def num_pinned(self) -> int:
        """Pages of pinned prompts, without those of their adapters."""
        return len(
            {
                page
                for sequence in self._pinned.values()
                for page in sequence.block_table[sequence.num_prefix // self.block_size :]
            }
        )

    def is_prompt_pinned(self, request_id: int) -> bool:
        return request_id in self._pinned

    def num_pages(self, sequence: Sequence) -> int:
        """The most pages that the sequence and its adapters take: when its last token is sampled.

        That token is not computed. Whole pages of a prefix are shared, and count once, as the adapter's.
        """
        num_tokens = sequence.num_prompt + max(sequence.job.max_tokens - 1, 0)
        num_pages = -(-num_tokens // self.block_size) - sequence.num_prefix // self.block_size
        return num_pages + sum(self._residency.num_pages(use.spec) for use in sequence.job.adapters)

    def check_fits(self, sequence: Sequence) -> None:
        """Check that the sequence could run if it were alone.

        Raises:
            RequestTooLargeError: it needs more pages than the arena has beside pinned prompts and adapters.
            QuotaExceededError: its adapters need more pages than its tenant may have.
        """
        self._check_quota(sequence)
        needed, pinned, available = self._room(sequence)
        if needed + pinned > available:
            beside = f", of which pinned prompts and adapters take {pinned}" if pinned else ""
            raise RequestTooLargeError(
                f"the request needs {needed} pages for its prompt, max_tokens and adapters, and the arena "
                f"has {available}{beside}; lower max_tokens, shorten the prompt"
                f"{', unpin a prompt' * bool(pinned)} or start the server with more --memory",
                needed_pages=needed,
                arena_pages=available,
                pinned_pages=pinned,
            )

    def check_pin_prompt(self, sequence: Sequence) -> None:
        """Check that the prompt could be pinned if no request ran.

        Raises:
            RequestTooLargeError: pinned prompts and adapters would take more than their share of the arena.
            QuotaExceededError: its adapters need more pages than its tenant may have.
        """
        self._check_quota(sequence)
        needed, pinned, available = self._room(sequence)
        most = int(available * _MAX_PINNED_SHARE)
        if needed + pinned > most:
            raise RequestTooLargeError(
                f"pinned prompts and adapters may take {most} of the arena's {available} pages; this prompt "
                f"and its adapters need {needed} and others take {pinned}; unpin a prompt or start the "
                "server with more --memory",
                needed_pages=needed,
                arena_pages=available,
                pinned_pages=pinned,
            )

    def check_pin_adapters(self, name: str, specs: Iterable[AdapterSpec]) -> None:
        """Check that adapters can be pinned under a name, instead of those that are pinned under it.

        Raises:
            AdapterTooLargeError: pinned prompts and adapters would take more than their share of the arena.
        """
        needed, available = sum(map(self._residency.num_pages, specs)), self._pool.num_pages
        own = {spec.revision for spec in specs}
        pinned = self._num_pinned_beside(own, self._residency.pinned(but=name))
        most = int(available * _MAX_PINNED_SHARE)
        if needed + pinned > most:
            raise AdapterTooLargeError(
                f"pinned prompts and adapters may take {most} of the arena's {available} pages; adapter "
                f"{name!r} needs {needed} and others take {pinned}; pin fewer or start the server with more "
                "--memory",
                adapter_pages=needed,
                arena_pages=available,
                pinned_pages=pinned,
            )

    def allocate(
        self, sequence: Sequence, residents: tuple[Resident, ...], leader: Sequence | None = None
    ) -> list[PageCopy] | None:
        """Share the adapters' prefix and cached blocks, and allocate pages for the other tokens.

        What a running `leader` has computed of the block in which the prompt ends is copied: only the last
        token of the prompt, whose logits are needed, is computed again.

        Returns:
            The page copies that the next step must make first; None if there are too few pages.
        """
        num_prefix = sequence.num_prefix
        whole = num_prefix // self.block_size
        # The last token is computed in any case: its logits are needed.
        keys = sequence.keys((len(sequence.tokens) - 1) // self.block_size, self.block_size)
        shares = not (sequence.needs_every_token or self.bidirectional)
        cached = self._cache.match(keys[whole:]) if shares else []
        prefix = [page for resident in residents for page in resident.prefix_pages]
        shared = prefix[:whole]
        missing = -(-len(sequence.tokens) // self.block_size) - len(shared) - len(cached)
        pages = self._pool.allocate(missing)
        if pages is None:
            self._pool.release(cached)
            self._cache.mark_released(keys[whole : whole + len(cached)])
            return None
        self._pool.share(shared)
        sequence.block_table = [*shared, *cached, *pages]
        sequence.num_computed = max(num_prefix, (whole + len(cached)) * self.block_size)
        for resident in residents:
            self._residency.acquire(resident, sequence.tenant)
        sequence.residents = residents
        source = None
        if num_prefix % self.block_size and not cached:
            source = prefix[whole]
        last, num_found = len(sequence.tokens) - 1, (whole + len(cached)) * self.block_size
        if leader is not None and self._is_rest_of_prompt(sequence, leader, num_found):
            source, sequence.num_computed = leader.block_table[last // self.block_size], last
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return [] if source is None else [PageCopy(source=source, target=pages[0])]

    def _is_rest_of_prompt(self, sequence: Sequence, leader: Sequence, num_found: int) -> bool:
        """Whether the block after the first `num_found` tokens is that of the prompt's last token, and the
        leader has computed the tokens before that one.
        """
        last = len(sequence.tokens) - 1
        begins = last - last % self.block_size
        return (
            not sequence.num_generated
            and leader.num_computed >= last > sequence.num_computed
            and num_found == begins
        )

    def needs_page(self, sequence: Sequence) -> bool:
        """Whether a running sequence has no page for its next token."""
        table = sequence.block_table
        return bool(table) and len(table) * self.block_size < len(sequence.tokens)

    def grow(self, sequence: Sequence) -> bool:
        """Allocate one more page; False if there is none."""
        pages = self._pool.allocate(1)
        sequence.block_table += pages or []
        return pages is not None

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Count `num_tokens` more as computed, and put the blocks that became whole into the cache."""
        before = max(sequence.num_computed, sequence.num_prefix) // self.block_size
        sequence.num_computed += num_tokens
        if self.bidirectional:
            return
        after = sequence.num_computed // self.block_size
        keys = sequence.keys(after, self.block_size)
        for index in range(before, after):
            self._cache.insert(keys[index], sequence.block_table[index])

    def invalidate(self, sequence: Sequence) -> None:
        """Remove the sequence's blocks from the cache, as they may be wrong."""
        self._cache.invalidate(sequence.keys(sequence.num_computed // self.block_size, self.block_size))

    def release(self, sequence: Sequence) -> None:
        """Release pages and adapters. Cached blocks can be found again until they are evicted."""
        self._pool.release(sequence.block_table)
        if not self.bidirectional:
            keys = sequence.keys(sequence.num_computed // self.block_size, self.block_size)
            self._cache.mark_released(keys)
        sequence.block_table = []
        sequence.num_computed = 0
        for resident in sequence.residents:
            self._residency.release(resident, sequence.tenant)
        sequence.residents = ()

    def pin_prompt(self, sequence: Sequence, beside: Iterable[Sequence]) -> None:
        """Keep the whole blocks of a computed prompt, and its adapters, until it is unpinned.

        Raises:
            RequestTooLargeError: there is too little room for it, or it leaves too little for one of the
                sequences `beside` it.
            QuotaExceededError: the same, for the pages that a tenant's adapters may take.
        """
        self.check_pin_prompt(sequence)
        request_id = sequence.job.request_id
        self._pinned[request_id] = sequence
        try:
            for other in beside:
                if other is not sequence:
                    self.check_fits(other)
        except (QuotaExceededError, RequestTooLargeError):
            del self._pinned[request_id]
            raise
        whole = sequence.num_prefix // self.block_size
        count = sequence.num_prompt // self.block_size
        keys = sequence.keys(count, self.block_size)[whole:]
        # If another sequence computed the same blocks at the same time, the cache may have its pages: those
        # are kept. If they were evicted since, the sequence's own are inserted.
        for key, page in zip(keys, sequence.block_table[whole:count], strict=True):
            self._cache.insert(key, page)
        cached = self._cache.match(keys)
        self._pool.release(sequence.block_table[whole:])
        sequence.block_table = [*sequence.block_table[:whole], *cached]

    def unpin_prompt(self, request_id: int) -> None:
        """Make a pinned prompt evictable; nothing happens if it is not pinned."""
        sequence = self._pinned.pop(request_id, None)
        if sequence is not None:
            self.release(sequence)

    def drop(self, revision: str) -> None:
        """Unpin the prompts of a revision that no new request names."""
        for request_id, sequence in list(self._pinned.items()):
            if any(use.spec.revision == revision for use in sequence.job.adapters):
                self.unpin_prompt(request_id)

    def _room(self, sequence: Sequence) -> tuple[int, int, int]:
        """Pages that the sequence needs, that others keep pinned, and that there are."""
        own = {use.spec.revision for use in sequence.job.adapters}
        pinned = self._num_pinned_beside(own, self._residency.pinned())
        return self.num_pages(sequence), pinned, self._pool.num_pages

    def _check_quota(self, sequence: Sequence) -> None:
        most = self._residency.max_pages(sequence.tenant)
        if most is None:
            return
        # Pinned adapters count against no tenant.
        shared = {spec.revision for spec in self._residency.pinned()}
        specs = {use.spec.revision: use.spec for use in sequence.job.adapters}
        own = {
            revision: self._residency.num_pages(spec)
            for revision, spec in specs.items()
            if revision not in shared
        }
        pinned = {
            resident.spec.revision: resident.num_pages
            for other in list(self._pinned.values())
            if other.tenant == sequence.tenant
            for resident in other.residents
            if resident.spec.revision not in specs.keys() | shared
        }
        if own and sum(own.values()) + sum(pinned.values()) > most:
            raise QuotaExceededError(
                f"the adapters of tenant {sequence.tenant!r} may take {most} pages of the arena; those of "
                f"this request need {sum(own.values())}, and those of its pinned prompts take "
                f"{sum(pinned.values())}; use fewer or smaller adapters, or unpin a prompt",
                tenant=sequence.tenant,
                quota="max_device_bytes",
            )

    def _num_pinned_beside(self, own: Collection[str], adapters: Iterable[AdapterSpec]) -> int:
        """Pages of these pinned adapters, and of pinned prompts with their adapters, without the adapters of
        `own` revisions. No page counts twice.
        """
        # A copy, as other threads check requests while the engine's thread pins and unpins.
        pinned = list(self._pinned.values())
        pages = {page for sequence in pinned for page in sequence.block_table}
        for sequence in pinned:
            for resident in sequence.residents:
                (pages.difference_update if resident.spec.revision in own else pages.update)(resident.pages)
        counted = {resident.spec.revision for sequence in pinned for resident in sequence.residents}
        others = (spec for spec in adapters if spec.revision not in counted and spec.revision not in own)
        return len(pages) + sum(map(self._residency.num_pages, others))
