"""Why rollouts are out of the loss, in words."""

from __future__ import annotations

# Why a rollout is out of the loss: the `note` of its reflection, and what a person reads.
NOTES = {
    "all_right": "group all right",
    "all_wrong": "group all wrong",
    "correct_left_out": "right (reflect.correct is off)",
    "overlong": "reflection prompt too long",
    "no_solution": "no correct sibling to show",
    "no_idea": "no idea found",
    "quote_missing": "quote not found",
    "teacher_overlong": "teacher prompt too long",
    "no_advantage": "reward is the group's mean",
}
