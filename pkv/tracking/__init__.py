"""What a run writes down while it goes: metrics, TensorBoard, rollouts, progress. No jax, no judgement."""

from pkv.tracking.clock import Clock
from pkv.tracking.progress import Progress
from pkv.tracking.tracker import Tracker, cut_lines, keep_lines, read_jsonl, write_rollouts, write_whole

__all__ = ["Clock", "Progress", "Tracker", "cut_lines", "keep_lines", "read_jsonl", "write_rollouts", "write_whole"]
