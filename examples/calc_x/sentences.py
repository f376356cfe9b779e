"""The words of the generated problems: names, things and, for each kind of problem, its sentence frames.

A frame has {A} {B} for names, {x} {y} for things, {j} {js} for a container and its plural, {a} {b} {c} {d} for the
numbers of the equation and {k} for a number that is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_NAMES = (
    "Ada Ben Cleo Dara Emil Fay Goro Hana Ivo Jun Kofi Lena Milo Nia Otis Pia Quin Ravi Suki Tom Uma Vera "
    "Wen Xena Yara Zeno Asha Bram Cora Dion Elsa Finn Gita Hugo Ines Jaya Karl Lulu Mina Noor"
)
_OBJECTS = (
    "apples beads bolts books bricks buttons candles cards combs corks crates cups drums eggs figs flags "
    "forks gems hats jars keys kites lamps lemons maps mugs nails nuts pears pens pins plates plums "
    "ribbons rings shells spoons stamps stones tiles"
)
NAMES = _NAMES.split()
OBJECTS = _OBJECTS.split()
CONTAINERS = (
    ("bag", "bags"), ("box", "boxes"), ("basket", "baskets"), ("tray", "trays"), ("shelf", "shelves"),
    ("case", "cases"), ("bucket", "buckets"), ("drawer", "drawers"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of problem: how it is worked out, from which numbers, and how it is told."""

    name: str
    equation: str
    ranges: Mapping[str, tuple[int, int]]
    """Smallest and largest value of each letter."""
    frames: tuple[str, ...]
    parts: tuple[str, ...] = ()
    """Parts of the equation that must be integers above zero for the story to make sense."""
    decimal: bool = False
    """Whether the result may have one decimal."""


def _kind(name: str, equation: str, ranges: str, frames: str, parts: str = "", decimal: bool = False) -> Kind:
    """Read a kind from text: letters are braced in equation and parts, ranges are "a:10-99 b:2-60"."""
    limits = {item[0]: (int(item[2:].split("-")[0]), int(item[2:].split("-")[1])) for item in ranges.split()}
    braced = str.maketrans({letter: f"{{{letter}}}" for letter in limits})
    return Kind(
        name=name,
        equation=equation.translate(braced),
        ranges=limits,
        frames=tuple(line.strip() for line in frames.strip().splitlines()),
        parts=tuple(part.translate(braced) for part in parts.split()),
        decimal=decimal,
    )


KINDS = (
    _kind("join", "a+b", "a:2-99 b:2-99", """
        {A} has {a} {x} and finds {b} more. How many {x} does {A} have now?
        There are {a} {x} in the hall and {b} {x} in the yard. How many {x} is that in all?
        {B} hands {b} {x} to {A}, who had {a} before. How many {x} does {A} hold now?
        A shelf carries {a} {x}, {k} {y} and behind them another {b} {x}. How many {x} does it carry?
        After {b} new {x} came to the {a} old ones, {A} counts all {x}. What is the count?
    """),
    _kind("take", "a-b", "a:10-99 b:2-90", """
        {A} has {a} {x} and loses {b}. How many {x} are left?
        {A} gives {b} {x} to {B}. There were {a} at first. How many {x} does {A} keep?
        Of {a} {x} in a {j}, {b} break. How many are whole?
        {B} takes {b} {x} out of a {j} that held {a} {x} and {k} {y}. How many {x} stay in it?
        A shop sells {b} {x} today. In the morning it had {a}. How many {x} has it at night?
    """, "a-b"),
    _kind("compare", "a-b", "a:10-99 b:2-90", """
        {A} has {a} {x} and {B} has {b}. How many more {x} has {A}?
        {B} owns {b} {x}. {A} owns {a}. How many fewer {x} does {B} own?
        One {j} holds {b} {x} and another holds {a}. By how many {x} do they differ?
        {A} made {a} {x} in {k} days and {B} made {b}. How many {x} is {A} ahead?
    """, "a-b"),
    _kind("more_than", "a+b", "a:2-99 b:2-99", """
        {A} has {b} more {x} than {B}. {B} has {a}. How many {x} has {A}?
        {B} sold {a} {x}. {A} sold {b} {x} more than that. How many did {A} sell?
        A red {j} has {a} {x}. A blue {j} has {b} {x} more. How many {x} are in the blue one?
        {A} is {b} years older than {B}, who is {a}. How old is {A}?
        {A}, who has {k} {y}, also has {b} {x} more than the {a} of {B}. How many {x} has {A}?
    """),
    _kind("missing", "a-b", "a:10-99 b:2-90", """
        {A} needs {a} {x} and has {b}. How many {x} are missing?
        {A} has {b} {x} but wants {a}. How many more must {A} find?
        With some new {x}, the {b} of {A} became {a}. How many were new?
        A {j} has room for {a} {x}. It has {b} {x} in it. How many more fit?
        {A} walks {a} miles to {B} and has done {b} in {k} hours. How many miles remain?
    """, "a-b"),
    _kind("groups", "a*b", "a:2-20 b:2-40", """
        {A} fills {a} {js} with {b} {x} each. How many {x} is that?
        Every {j} has {b} {x}. How many {x} are in {a} {js}?
        There are {b} {x} in a row. {A} lays {a} rows. How many {x} does {A} lay?
        {a} friends bring {b} {x} each and {k} {y} in all. How many {x} do they bring?
    """),
    _kind("cost", "a*b", "a:2-20 b:2-40", """
        {A} buys {a} {x}. Each costs {b} coins. How many coins does {A} pay?
        At {b} coins for one, what do {a} {x} cost?
        {A} earns {b} coins an hour and works {a} hours. How many coins does {A} earn?
        {B} has {k} {x} and sells {a} of them at {b} coins each. How many coins does {B} get?
    """),
    _kind("times", "a*b", "a:2-60 b:2-12", """
        {A} has {a} {x}. {B} has {b} times as many. How many {x} has {B}?
        {B} picked {b} times as many {x} as {A}, who picked {a}. How many did {B} pick?
        A rope is {a} feet long. Another is {b} times as long. How many feet is that?
        {A} ran {a} miles in {k} days. {B} ran {b} times as far. How many miles did {B} run?
    """),
    _kind("share", "a/b", "a:4-99 b:2-12", """
        {A} shares {a} {x} among {b} friends. How many {x} does each get?
        {b} children split {a} {x} evenly. How many {x} has each child?
        {A} puts the same number of {x} in each of {b} {js}, {a} in all. How many are in one?
        In {b} days {A} made {a} {x}, the same number each day. How many a day?
        {b} friends share {a} {x} and see {k} {y}. How many {x} does one friend get?
    """, "a/b"),
    _kind("pack", "a/b", "a:4-99 b:2-12", """
        {A} packs {a} {x}, {b} to a {j}. How many {js} does {A} fill?
        One {j} takes {b} {x}. How many {js} are needed for {a} {x}?
        {A} pays {a} coins for {x} at {b} coins each. How many {x} does {A} get?
        {A} uses {b} {x} a day. For how many days do {a} {x} last?
        {A} has {k} {y} and {a} {x}, and lays {b} {x} on each table. How many tables get {x}?
    """, "a/b"),
    _kind("join_three", "a+b+c", "a:2-60 b:2-60 c:2-60", """
        {A} has {a} {x}, finds {b} and buys {c}. How many {x} is that?
        There are {a} red, {b} blue and {c} green {x}. How many {x} are there?
        {A} ran {a} miles, then {b}, then {c}. How many miles did {A} run?
        Three {js} hold {a}, {b} and {c} {x}. A fourth holds {k} {y}. How many {x} are there?
    """),
    _kind("join_take", "a+b-c", "a:2-60 b:2-60 c:2-60", """
        {A} has {a} {x}, gets {b} and loses {c}. How many {x} are left?
        {A} lost {c} {x} after {b} were added to the first {a}. How many {x} remain?
        A bus has {a} people. At a stop {b} get on and {c} get off. How many are on it now?
        {B} gave {A} {b} {x}. {A} had {a} and sold {c} of all. How many {x} has {A}?
        From {a} {x} and {b} {y}, {c} things are taken. How many things are left?
    """, "a+b-c"),
    _kind("take_twice", "a-b-c", "a:20-99 b:2-45 c:2-45", """
        {A} has {a} {x}, gives {b} to {B} and loses {c}. How many {x} are left?
        {b} {x} broke and {c} got lost. {A} had {a} before. How many {x} has {A} now?
        Of {a} {x}, {b} are red, {c} are blue and the rest are green. How many are green?
        {A} had {a} coins and paid {b} for {k} {x} and {c} for a {j}. How many coins are left?
    """, "a-b a-b-c"),
    _kind("take_join", "a-b+c", "a:10-99 b:2-60 c:2-60", """
        {A} has {a} {x}, sells {b} and then buys {c}. How many {x} has {A} now?
        {A} found {c} {x} after losing {b} of {a}. How many {x} has {A}?
        A {j} held {a} {x}. {B} took {b} out and put {c} in. How many are in it?
        {A} had {a} {x} and {k} {y}, gave {b} {x} away and made {c} new {x}. How many {x} are there?
    """, "a-b"),
    _kind("sum_times", "(a+b)*c", "a:2-30 b:2-30 c:2-12", """
        {A} puts {a} {x} and {b} {y} in each of {c} {js}. How many things is that?
        Each of {c} friends has {a} {x} and {b} {y}. How many things have they?
        For {c} days {A} makes {a} {x} at dawn and {b} at night. How many {x} is that?
        {A} buys {c} sets. A set is one lamp for {a} coins and one cup for {b}. What is the cost?
    """),
    _kind("rest_times", "(a-b)*c", "a:5-60 b:2-55 c:2-12", """
        {A} has {a} {x}, loses {b} and sells the rest for {c} coins each. How many coins is that?
        At {c} coins each, what do {a} {x} without {b} broken ones cost?
        In each of {c} {js} there were {a} {x}, and {b} were taken from each. How many {x} are left?
        {A} earns {a} coins a day and spends {b}. How many coins has {A} after {c} days?
        Of {a} guests {b} went home. {A} gives {c} {x} to each who stays. How many {x} is that?
    """, "a-b"),
    _kind("groups_take", "a*b-c", "a:2-15 b:2-30 c:2-90", """
        {A} has {a} {js} of {b} {x} and loses {c} {x}. How many {x} are left?
        {A} gave away {c} {x} from {a} {js} with {b} {x} in each. How many {x} remain?
        {A} works {a} hours for {b} coins an hour and pays {c} coins. How many coins are left?
        Out of {a} rows of {b} {x}, {c} {x} are old and the others new. How many are new?
    """, "a*b-c"),
    _kind("groups_join", "a*b+c", "a:2-15 b:2-30 c:2-90", """
        {A} has {a} {js} of {b} {x} and {c} loose {x}. How many {x} is that?
        {A} had {c} {x} and buys {a} {js} with {b} {x} in each. How many {x} has {A} now?
        {A} pays {c} coins for a {j} and {b} coins for each of {a} {x}. How many coins is that?
        {B} saved {c} coins, then {b} coins a week for {a} weeks. How many coins has {B}?
        To {c} {x} and {k} {y}, {A} adds {a} rows of {b} {x}. How many {x} are there?
    """),
    _kind("rest_shared", "(a-b)/c", "a:10-99 b:2-80 c:2-9", """
        {A} has {a} {x}, keeps {b} and shares the rest among {c} friends. How many {x} does each get?
        {b} of {a} {x} are broken. The others go in {c} {js}, the same in each. How many are in one?
        {A} eats {b} of {a} figs and packs the rest, {c} to a {j}. How many {js} are packed?
        {c} friends pay {a} coins less a gift of {b}, each the same. How many coins does one pay?
    """, "a-b (a-b)/c"),
    _kind("sum_shared", "(a+b)/c", "a:2-70 b:2-70 c:2-9", """
        {A} has {a} {x}, {B} has {b}, and they share all among {c} friends. How many does each get?
        {a} red and {b} blue {x} go in {c} {js}, the same in each. How many are in one?
        {c} people can sit at a table. {a} girls and {b} boys come. How many tables are full?
        {A} finds {b} {x} besides the first {a} and packs {c} to a {j}. How many {js} is that?
    """, "(a+b)/c"),
    _kind("two_products", "a*b+c*d", "a:2-12 b:2-20 c:2-12 d:2-20", """
        {A} buys {a} {x} at {b} coins and {c} {y} at {d} coins each. How many coins is that?
        There are {a} {js} of {b} {x} and {c} {js} of {d} {y}. How many things are there?
        {A} works {a} hours at {b} coins and {B} {c} hours at {d} coins. What do they earn in all?
        At {b} coins for one of the {x} and {d} for one of the {y}, what do {a} {x} and {c} {y} cost?
    """),
    _kind("two_products_apart", "a*b-c*d", "a:2-12 b:2-20 c:2-12 d:2-20", """
        {A} sells {a} {x} at {b} coins each and buys {c} {y} at {d} each. How many coins are left?
        {A} has {a} {js} of {b} {x}. {B} has {c} of {d}. How many more {x} has {A}?
        {A} uses {d} {x} a day for {c} days out of {a} {js} of {b} {x}. How many {x} are left?
        {B} ran {d} miles on {c} days. {A} ran {b} miles on {a} days. How many more did {A} run?
    """, "a*b-c*d"),
    _kind("change", "a-b*c", "a:20-99 b:2-12 c:2-20", """
        {A} has {a} coins and buys {b} {x} at {c} coins each. How many coins are left?
        {A} buys {b} {x}. One costs {c} coins. {A} pays with {a}. How many coins come back?
        {A} gives {c} {x} to each of {b} friends and had {a}. How many {x} does {A} keep?
        A book has {a} pages. {A} reads {c} a day for {b} days. How many pages are left?
        {A}, with {a} coins and {k} {y}, buys {b} {x} for {c} coins each. How many coins are left?
    """, "a-b*c"),
    _kind("average", "(a+b)/2", "a:2-99 b:2-99", """
        {A} has {a} {x} and {B} has {b}. They share them evenly. How many does each have?
        {A} ran {a} miles one day and {b} the next. How many miles a day is that on average?
        What is the mean of {a} and {b}?
        Two {js} weigh {a} and {b} pounds. What is their average weight in pounds?
    """, decimal=True),
    _kind("share_join", "a/b+c", "a:4-99 b:2-12 c:2-60", """
        {A} gets an even share of {a} {x} among {b} friends and had {c} before. How many has {A}?
        {A} has {c} {x}. Then {b} friends, {A} among them, split {a} more. How many {x} has {A} now?
        {b} friends share {a} coins. {A} is one of them and finds {c} coins. How many has {A}?
        A {j} held {c} {x}. {A} adds {a} {x} to {b} such {js}, the same to each. How many are in one?
    """, "a/b"),
    _kind("rate", "a/b*c", "a:4-99 b:2-12 c:2-15", """
        {b} {x} cost {a} coins. What do {c} {x} cost?
        {A} walks {a} miles in {b} hours. How many miles does {A} walk in {c} hours?
        {c} {js} are full. If {b} {js} hold {a} {x}, how many {x} do the full ones hold?
        {A} makes {a} {x} in {b} days. How many {x} does {A} make in {c} days?
        In {b} hours {k} people and one machine make {a} {x}. How many {x} come in {c} hours?
    """, "a/b"),
)  # fmt: skip
