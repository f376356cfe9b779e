"""Facts read off passages by patterns: what the tiny policy learns from, before reinforcement learning.

    "Brother" is a song by the American rock band Pearl Jam.   ->   Brother >> performer: Pearl Jam

The patterns are loose and the facts are sometimes wrong, as anything read off text at scale. `redrawn` puts other
names for both, so that what can be learnt is to look the answer up and not the answer.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

_WORD = r"[A-ZÀ-ÞŌŠŽ][\w.'’&-]*\w"
NAME = rf"{_WORD}(?: (?:(?:of|the|and|de|da|del|von|van|der|la|le|du|di|al|bin) ){{0,2}}(?:{_WORD}|[A-Z]\.))*"
WHO = rf"(?:the )?(?:(?:{_WORD} )?(?:[a-z][\w/&-]*,? ){{1,6}})?({NAME})"
""" "the American rock band Pearl Jam", of which the name is kept."""
PLACE = rf"({_WORD}(?: (?:of )?{_WORD}){{0,3}})"
WORK = r"\b(?:song|single|album|EP|track|mixtape|record|ballad)\b[^.;]{0,50}?"
BOOK = r"\b(?:novel|book|play|poem|novella|story|biography|series|memoir|essay|manga|comic)\b[^.;]{0,50}?"
FILM = r"\b(?:film|movie|comedy|drama|thriller|documentary|series)\b[^.;]{0,80}?"
KIND = r"(?:County|District|Province|Municipality|Parish|Region|State|Prefecture|Governorate|Township|Voivodeship)"

OF_TITLE: Mapping[str, Sequence[str]] = {
    "performer": (rf"{WORK}\b(?:by|from|of) {WHO}", rf"{WORK}(?:performed|recorded|released) by {WHO}"),
    "author": (rf"{BOOK}\b(?:written )?by {WHO}", rf"\bwritten by {WHO}"),
    "director": (rf"\bdirected by {WHO}",),
    "producer": (rf"\bproduced by {WHO}",),
    "composer": (rf"\bcomposed by {WHO}", rf"\b(?:opera|ballet|symphony|music|musical|score)\b[^.]{{0,30}}by {WHO}"),
    "screenwriter": (rf"{FILM}\bwritten by {WHO}",),
    "lyrics by": (rf"\blyrics (?:were )?(?:written )?by {WHO}",),
    "cast member": (rf"\b(?:starring|stars|starred) {WHO}", rf"\bfeaturing {WHO}"),
    "creator": (rf"\b(?:created|painted|painting|sculpture|designed)\b[^.]{{0,20}} by {WHO}",),
    "developer": (rf"\bdeveloped by {WHO}",),
    "publisher": (rf"\bpublished by {WHO}",),
    "distributed by": (rf"\bdistributed by {WHO}",),
    "manufacturer": (rf"\b(?:manufactured|built|produced|made) by {WHO}",),
    "owned by": (rf"\bowned (?:and operated )?by {WHO}", rf"\bsubsidiary of {WHO}"),
    "operator": (rf"\b(?:operated|managed|run) by {WHO}",),
    "founded by": (rf"\bfounded (?:in \d{{4}} )?by {WHO}", rf"\bestablished (?:in \d{{4}} )?by {WHO}"),
    "named after": (rf"\bnamed (?:after|for|in honou?r of) {WHO}",),
    "based on": (rf"\bbased on {WHO}", rf"\badaptation of {WHO}"),
    "place of birth": (
        rf"\bborn\b[^()]{{0,40}}? in {PLACE}",
        rf"\([^()]*?\d{{4}},? (?:in )?{PLACE}",
        rf"\b(?:is|was) an? [^.]{{0,40}}\bfrom {PLACE}",
    ),
    "place of death": (
        rf"\([^()]*?\d{{4}}[^()]*?[-–] ?[^()]*?\d{{4}},? (?:in )?{PLACE}",
        rf"\b(?:died|killed|assassinated)\b[^.;]{{0,30}}? (?:in|at) {PLACE}",
    ),
    "residence": (rf"\b(?:lives|lived|resides|residing|living) in {PLACE}",),
    "located in the administrative territorial entity": (
        rf"\bin (?:the )?((?:{_WORD} ){{1,3}}{KIND})\b",
        rf"\b(?:village|town|city|community|place|township|municipality|river|lake|mountain|school|district|suburb)"
        rf"\b[^.]{{0,30}}? (?:in|of) (?:the )?(?:[a-z]+ (?:district|region|part|state|province) of )?{PLACE}",
        rf"\bin the {PLACE} (?:district|region|province|state|county|municipality)\b",
    ),
    "location": (rf"\b(?:located|held|situated|took place|takes place|event) (?:in|at) {PLACE}",),
    "headquarters location": (rf"\b(?:based|headquartered|headquarters (?:is|are)) in {PLACE}",),
    "location of formation": (rf"\bformed (?:in \d{{4}} )?in {PLACE}",),
    "licensed to broadcast to": (
        rf"\b(?:licensed|broadcasting) (?:to|in) {PLACE}",
        rf"\b(?:radio|television) station\b[^.]{{0,40}} in {PLACE}",
    ),
    "part of": (
        rf"\bin the ({NAME} (?:Range|Mountains|Islands|District|Hills|Alps))\b",
        rf"\b(?:a )?part of (?:the )?({NAME})",
        rf"\bdivision of (?:the )?({NAME})",
    ),
    "mouth of the watercourse": (rf"\b(?:tributary of|flows into|joins) (?:the )?({NAME})",),
    "located in or next to body of water": (rf"\b(?:on|along|near) the ({NAME} River|River {_WORD}|Lake {_WORD})",),
    "located on terrain feature": (rf"\bon (?:the )?((?:{_WORD} )+(?:Island|Mountains|Peninsula|Hills|Plateau))",),
    "crosses": (rf"\b(?:crosses|crossing|spans|over) the ({NAME})",),
    "spouse": (
        rf"\b(?:married|married to|wife of|husband of|widow of|consort of) {WHO}",
        rf"\b(?:his wife|her husband|spouse),? {WHO}",
    ),
    "father": (rf"\b(?:son|daughter|child) of {WHO}", rf"\b(?:his|her) father,? {WHO}"),
    "mother": (rf"\b(?:son|daughter|child) of [^.]{{3,40}} and (?:his wife )?({NAME})", rf"\bmother,? {WHO}"),
    "sibling": (
        rf"\b(?:brother|sister|twin) (?:of|to) {WHO}",
        rf"\b(?:his|her) (?:[a-z]+ )?(?:brother|sister),? {WHO}",
    ),
    "child": (rf"\b(?:father|mother|parent) of {WHO}", rf"\b(?:his|her) (?:son|daughter),? {WHO}"),
    "member of sports team": (
        rf"\b(?:plays|played|playing|pitched|player) (?:[a-z -]+ )?(?:for|with|at) (?:the )?({NAME})",
        rf"\b(?:drafted|signed) by (?:the )?({NAME})",
    ),
    "educated at": (rf"\b(?:graduated? (?:of|from)|educated at|attended|studied at|alumnus of) (?:the )?({NAME})",),
    "employer": (
        rf"\b(?:professor|works|worked|teaches|taught|employed|lecturer)\b[^.]{{0,30}} (?:at|for|by) (?:the )?({NAME})",
    ),
    "member of political party": (rf"\b((?:{_WORD} ){{1,3}}Party)\b",),
    "member of": (rf"\b(?:member|leader|singer|guitarist|drummer) (?:of|for) (?:the )?(?:[a-z]+ )*({NAME})",),
    "record label": (
        rf"\b({NAME} (?:Records|Music|Recordings|Entertainment))\b",
        rf"\breleased (?:on|by|through) {WHO}",
    ),
    "award received": (
        rf"\b(?:won|received|awarded|recipient of) (?:the |an? )?(\d{{4}} )?((?:{_WORD} )+(?:Award|Prize|Medal)s?)",
    ),
    "conflict": (rf"\b(?:during|in) (?:the )?((?:{_WORD} )*(?:War|War II|War I|Revolution|Rebellion))\b",),
    "capital": (rf"\b(?:capital|county seat|seat|administrative center) (?:is|at|of) {PLACE}",),
    "follows": (rf"\b(?:follow-up to|followed|sequel to|succeeded|preceded by|after) (?:the )?({NAME})",),
    "languages spoken, written or signed": (rf"\b(?:speaks?|spoken|written|language) (?:in )?({_WORD})",),
    "original network": (rf"\b(?:aired|airs|broadcast) on (?:the )?({NAME})",),
    "instrument": (r"\b(guitarist|pianist|drummer|bassist|violinist|saxophonist|trumpeter|cellist|keyboardist)",),
    "sport": (r"\b(football|basketball|baseball|cricket|rugby|ice hockey|tennis|golf|boxing|swimming|athletics)\b",),
    "instance of": (rf"\b(?:is|was) an? (?:{_WORD} )?((?:[a-z-]+ )?[a-z-]+) (?:in|of|located|by|from|on|that)\b",),
    "position held": (
        r"\b(?:served as|elected|appointed|was the) (?:the )?(?:\d+\w+ )?((?:[A-Z]\w+ )?(?:[A-Z]\w+)(?: of \w+)?)",
    ),
    "religion": (
        r"\b(Catholic|Islam|Christian|Jewish|Buddhist|Hindu|Muslim|Protestant|Methodist|Anglican|Orthodox|Baptist)\b",
    ),
}
"""Relation of the passage's title -> patterns whose last group is the answer."""

OF_NAME: Mapping[str, Sequence[str]] = {
    "capital": (rf"\b(?:capital|county seat|seat) of (?:the )?(?:[a-z]+ of )?({NAME})",),
    "child": (rf"\b(?:son|daughter) of {WHO}",),
    "sibling": (rf"\b(?:brother|sister) of {WHO}",),
    "spouse": (rf"\b(?:married|wife of|husband of) {WHO}",),
    "has part": (rf"\b(?:member|part) of (?:the )?({NAME})",),
    "notable work": (rf"\b(?:written|directed|composed|created) by {WHO}",),
    "contains administrative territorial entity": (rf"\bin (?:the )?((?:{_WORD} ){{1,3}}{KIND})\b",),
    "capital of": (rf"\b(?:capital|county seat|seat) (?:is|at) {PLACE}",),
}
"""Relation of the name that a pattern finds -> patterns; the answer is the title."""

PAIRS: Sequence[tuple[str, str]] = (
    ("shares border with", rf"\b((?:{_WORD} ){{1,2}}{KIND})\b[^.]*?\b((?:{_WORD} ){{1,2}}{KIND})\b"),
    ("shares border with", rf"\bborder(?:s|ed|ing)?(?: (?:by|with|of))?(?: the)? ({NAME})[^.]*? and(?: the)? ({NAME})"),
    ("spouse", rf"\b({NAME}) (?:and|&) (?:his wife|her husband),? ({NAME})"),
)
"""Two names that are each other's answer."""

COUNTRIES = (
    "United States|U.S.|United Kingdom|England|Scotland|Wales|Ireland|Canada|Australia|New Zealand|India|Pakistan|"
    "Bangladesh|Sri Lanka|Nepal|China|Taiwan|Japan|South Korea|North Korea|Philippines|Indonesia|Malaysia|Singapore|"
    "Thailand|Vietnam|Cambodia|Laos|Myanmar|Mongolia|Iran|Iraq|Syria|Turkey|Israel|Lebanon|Jordan|Saudi Arabia|Yemen|"
    "Oman|Qatar|Afghanistan|Uzbekistan|Kazakhstan|Kyrgyzstan|Turkmenistan|Azerbaijan|Armenia|Georgia|Russia|Ukraine|"
    "Belarus|Poland|Germany|Austria|Switzerland|France|Belgium|Netherlands|Luxembourg|Denmark|Norway|Sweden|Finland|"
    "Iceland|Estonia|Latvia|Lithuania|Czech Republic|Slovakia|Hungary|Romania|Bulgaria|Serbia|Croatia|Slovenia|Bosnia|"
    "Albania|Greece|Cyprus|Malta|Italy|Spain|Portugal|Egypt|Libya|Tunisia|Algeria|Morocco|Mauritania|Mali|Niger|Chad|"
    "Sudan|Ethiopia|Eritrea|Somalia|Djibouti|Kenya|Uganda|Tanzania|Rwanda|Burundi|Congo|Gabon|Cameroon|Nigeria|Benin|"
    "Togo|Ghana|Ivory Coast|Liberia|Sierra Leone|Guinea|Senegal|Gambia|Angola|Zambia|Zimbabwe|Malawi|Mozambique|"
    "Madagascar|Mauritius|Namibia|Botswana|South Africa|Mexico|Guatemala|Belize|Honduras|Nicaragua|Costa Rica|Panama|"
    "Cuba|Jamaica|Haiti|Dominican Republic|Puerto Rico|Trinidad and Tobago|Barbados|Colombia|Venezuela|Guyana|Suriname|"
    "Ecuador|Peru|Bolivia|Brazil|Paraguay|Uruguay|Chile|Argentina|Fiji|Samoa|Tonga|Papua New Guinea"
)
DEMONYMS = {
    "American": "United States",
    "British": "United Kingdom",
    "English": "England",
    "Canadian": "Canada",
    "Australian": "Australia",
    "Indian": "India",
    "German": "Germany",
    "French": "France",
    "Italian": "Italy",
    "Spanish": "Spain",
    "Swedish": "Sweden",
    "Norwegian": "Norway",
    "Danish": "Denmark",
    "Dutch": "Netherlands",
    "Russian": "Russia",
    "Japanese": "Japan",
    "Chinese": "China",
    "Mexican": "Mexico",
    "Brazilian": "Brazil",
    "Irish": "Ireland",
    "Austrian": "Austria",
    "Polish": "Poland",
    "Filipino": "Philippines",
    "Nigerian": "Nigeria",
    "Iranian": "Iran",
    "Turkish": "Turkey",
}
_ADJECTIVE = rf"\b(?:is|was) an? ({'|'.join(DEMONYMS)})\b"

COMMONEST = 30
"""Relations, half of all, that make most of the facts."""


@dataclass(frozen=True)
class Fact:
    """What a passage says of an entity."""

    entity: str
    relation: str
    answer: str
    title: str
    text: str


def facts_in(title: str, text: str) -> Iterator[Fact]:
    """The facts of a passage's opening words, by the patterns."""
    about = re.sub(r" \([^)]*\)$|, .*", "", title)
    for relation, patterns in OF_TITLE.items():
        matched = next((match for pattern in patterns if (match := re.search(pattern, text))), None)
        if matched and _usable(answer := re.sub(r"['’]s$", "", matched[matched.re.groups].strip()), about):
            yield Fact(about, relation, answer, title, text)
    for relation, patterns in OF_NAME.items():
        matched = next((match for pattern in patterns if (match := re.search(pattern, text))), None)
        if matched and _usable(matched[1], about):
            yield Fact(matched[1], relation, about, title, text)
    for relation, pattern in PAIRS:
        matched = re.search(pattern, text)
        if matched and matched[1] != matched[2]:
            yield Fact(matched[1], relation, matched[2], title, text)
            yield Fact(matched[2], relation, matched[1], title, text)
    countries = re.findall(rf"\b(?:{COUNTRIES.replace('.', '[.]')})(?=\W|$)", text.split(". ")[0])
    if countries and not re.search(r"\(born|\bborn\b", text):
        yield Fact(about, "country", countries[-1], title, text)
    adjective = re.search(_ADJECTIVE, text)
    if adjective:
        relation = "country of citizenship" if re.search(r"\bborn\b|\d{4} ?[-–]", text) else "country"
        yield Fact(about, relation, DEMONYMS[adjective[1]], title, text)


def _usable(answer: str, about: str) -> bool:
    return len(answer.split()) <= 6 and answer not in about and about not in answer and answer not in _NO_NAMES


_NO_NAMES = frozenset({"The", "He", "She", "It", "In", "This", "His", "Her", "They", "January", "February", "March",
    "April", "May", "June", "July", "August", "September", "October", "November", "December"})  # fmt: skip


def all_facts(passages: Sequence[tuple[str, str]], words: int) -> list[Fact]:
    """The facts of passages (title, text), each read from any of its sentences on, `words` words far."""
    facts = []
    for title, text in passages:
        for start in sentence_starts(text):
            part = " ".join(text[start:].split()[:words])
            facts += [fact for fact in facts_in(title, part) if start == 0 or fact.relation not in _OPENING_ONLY]
    return facts


_OPENING_ONLY = {"country", "instance of", "sport", "religion", "instrument"}


def sentence_starts(text: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"(?<=[a-z)\"'\d][.!?])\s+(?=[A-Z\"'])", text))]


class Redraw:
    """Facts with other names: the entity's and the answer's are those of other facts of the relation, or of any."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._facts: dict[str, list[Fact]] = defaultdict(list)
        for fact in facts:
            self._facts[fact.relation].append(fact)
        self._relations = list(self._facts)
        # Rare relations as often as their number's root says.
        self._weights = [len(self._facts[name]) ** 0.5 for name in self._relations]
        by_size = sorted(self._relations, key=lambda name: -len(self._facts[name]))
        self._titles = [fact.entity for fact in facts]
        self.common = frozenset(by_size[:COMMONEST])

    def draw(self, rng: random.Random) -> Fact:
        """A fact as it was read."""
        return rng.choice(self._facts[rng.choices(self._relations, self._weights)[0]])

    def redrawn(self, fact: Fact, rng: random.Random) -> Fact:
        """The same with other names in question and passage."""
        others = self._facts[fact.relation]
        if fact.answer in fact.text and rng.random() < 0.7:
            new = rng.choice(others).answer
            if fact.relation != "country of citizenship":
                fact = _rename(fact, fact.answer, new)
        if rng.random() < 0.7:
            new = rng.choice(others).entity if rng.random() < 0.6 else rng.choice(self._titles)
            if new != fact.answer:
                fact = _rename(fact, fact.entity, new)
        return fact


def _rename(fact: Fact, old: str, new: str) -> Fact:
    def put(text: str) -> str:
        return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, text)

    return replace(fact, entity=put(fact.entity), answer=put(fact.answer), title=put(fact.title), text=put(fact.text))
