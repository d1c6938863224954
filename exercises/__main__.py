"""Which exercises of docs/exercises.md are solved: python -m exercises, or python -m exercises 3 for one."""

import sys

from exercises.checks import EXERCISES, FOLDER, judge


def main(words: list[str], folder=FOLDER) -> int:
    """Print a line for each exercise asked for; returns 0 if all of them are solved, 2 for a wrong number,
    130 after Ctrl-C."""
    numbers = [str(n) for n in range(1, len(EXERCISES) + 1)]
    if set(words) - set(numbers):
        print(f"exercises: {' '.join(words)}: expected numbers from 1 to {len(EXERCISES)}", file=sys.stderr)
        return 2
    solved, asked = 0, words or numbers
    for number in asked:
        exercise = EXERCISES[int(number) - 1]
        try:
            state, said = judge(exercise, folder)
        except KeyboardInterrupt:
            print(f"\nstopped in exercises/{exercise.file}", file=sys.stderr)
            return 130
        print(f"{number:>2}  {state:8} exercises/{exercise.file}{': ' * bool(said)}{said}")
        solved += state == "solved"
    print(f"{solved} of {len(asked)} solved; docs/exercises.md says what to do")
    return int(solved < len(asked))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
