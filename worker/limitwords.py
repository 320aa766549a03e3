"""What each limit means, in words for its owner: for the page's form and for `rankup worker limits`.

What always holds: every limit of `worker.limits.Limits` has its words here, in the order in which they are shown.
"""

from __future__ import annotations

from typing import Literal

from rankup.message import Answer


class LimitWords(Answer):
    """One limit: which control fits it, its unit, what it means."""

    name: str
    kind: Literal["switch", "number", "programs", "week"]
    unit: str = ""
    words: str


LIMIT_WORDS: tuple[LimitWords, ...] = (
    LimitWords(name="run_gpu_if_user_active", kind="switch", words="Use the graphics card while somebody is at work"),
    LimitWords(name="run_if_user_active", kind="switch", words="Use the processor while somebody is at work"),
    LimitWords(name="idle_time_to_run", kind="number", unit="min", words="Nobody is at work this long after a key"),
    LimitWords(name="run_on_batteries", kind="switch", words="Work on battery power"),
    LimitWords(name="exclusive_app", kind="programs", words="Pause while one of these programs runs, such as a game"),
    LimitWords(name="start_hour", kind="number", unit="h", words="Work from this hour of the day (22.5 is 22:30)"),
    LimitWords(name="end_hour", kind="number", unit="h", words="… to this one; the same hour twice: all day"),
    LimitWords(name="week", kind="week", words="Days with other hours"),
    LimitWords(name="gpu_usage_limit", kind="number", unit="%", words="Share of the time that is spent computing"),
    LimitWords(name="gpu_temp_limit_c", kind="number", unit="°C", words="Pause when the card is this hot; 0: never"),
    LimitWords(name="gpu_temp_resume_c", kind="number", unit="°C", words="… go on below; 0: ten degrees less"),
    LimitWords(name="threads", kind="number", words="Processor threads of the training; 0: as at the start"),
    LimitWords(name="nice", kind="number", words="How far other programs go first, 0 to 19"),
    LimitWords(name="max_bytes_sec_up", kind="number", unit="B/s", words="Fastest upload; 0: no limit"),
    LimitWords(name="max_bytes_sec_down", kind="number", unit="B/s", words="Fastest download; 0: no limit"),
    LimitWords(name="daily_xfer_limit_mb", kind="number", unit="MB", words="Up and down in a day; 0: no limit"),
    LimitWords(name="disk_max_used_gb", kind="number", unit="GB", words="Room for base versions; 0: as installed"),
)
