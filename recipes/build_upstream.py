"""Builds an upstream set to pre-train on: printed and handwritten letters and pictures of icon sets, without a digit among them.

    pip install fonttools resvg-py scikit-image
    python recipes/build_upstream.py --out runs/upstream/set --cache runs/upstream/cache

The sources come from the Debian archive (`apt-get download`, no root) and the npm registry (`npm pack`), and are kept in --cache.
Only permissive, CC BY, OFL and public domain sources are taken; OUT/ATTRIBUTION.md lists them. OUT holds

    train/train-00000-of-000NN.parquet, ...       the trained classes
    train.npz                                     the same as arrays, for `bit_mixup.ArrayImages`
    held_out_glyphs, held_out_pictures            train.parquet (10 drawings a class) and test.parquet of classes never trained on
    classes.json, facts.json, ATTRIBUTION.md      what is in it and where it is from

Every draw is a function of --seed. The npm packages are pinned, the Debian packages are those of the archive in use.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bit_mixup.storage import whole_folder, write_json, write_text

SIDE, MARGIN = 48, 4
LEAST, MOST, FAMILIES = 4, 24, 3  # drawings of a class
HANDS = 100  # drawings of a letter by handwriting fonts, on top
PENS, PENS_SHARE = 6, 4  # and by a pen: so many, or one for each four of the others if that is more
PER_SCRIPT, PER_ICON_SET = 700, 4
HELD_OUT, HELD_OUT_LEAST, HELD_OUT_TRAIN = 50, 16, 10
PLACEHOLDER = 5  # letters for which a font has one and the same drawing: a stand-in for what it lacks
SHARD = 20_000  # rows of a parquet file
ALIKE = {"glyph": 0.96, "picture": 0.98}  # correlation of two drawings in one style from which they count as the same
ALLOWED = {"Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "OFL-1.1", "Unlicense"}

FONT_PACKAGES = {  # licence of the font files as read in each package's copyright file: Debian packages fonts-NAME
    "OFL-1.1": """
        anonymous-pro bwht cabin cabinsketch cherrybomb comfortaa comic-neue courier-prime croscore
        crosextra-caladea crosextra-carlito dancingscript dkg-handwriting dosis dotgothic16 ebgaramond ecolier-court
        fantasque-sans gfs-artemisia gfs-baskerville gfs-bodoni-classic gfs-complutum gfs-didot gfs-gazis
        gfs-neohellenic gfs-olga gfs-porson gfs-solomos gfs-theokritos gnutypewriter hosny-amiri humor-sans inter
        joscelyn junction jura karla kaushanscript klee kristi lato league-spartan leckerli-one lemonada liberation2
        lobster lobstertwo lohit-beng-bengali lohit-deva lohit-gujr lohit-guru lohit-knda lohit-mlym lohit-orya
        lohit-taml lohit-telu lxgw-wenkai manrope mononoki morisawa-bizud-gothic morisawa-bizud-mincho mplus nanum
        nanum-extra naver-d2coding noto-core noto-extra play quattrocento quicksand reggae rocknroll seto
        sil-abyssinica sil-andika sil-annapurna sil-charis sil-doulos sil-ezra sil-gentiumplus sil-harmattan
        sil-lateef sil-nuosusil sil-padauk sil-scheherazade smc-chilanka smc-gayathri smc-manjari smiley-sans sora
        stick tomsontalks vollkorn woowa-bm yanone-kaffeesatz yrsa-rasa yusei-magic""",
    "OFL-1.0": "breip inconsolata oldstandard",
    "Apache-2.0": "jetbrains-mono motoya-l-cedar motoya-l-maruberi open-sans roboto-slab roboto-unhinted",
    "Bitstream Vera and public domain": "dejavu-core dejavu-extra hack",
    "CC-BY-3.0": "opendyslexic sawarabi-gothic",
    "MIT": "fanwood lindenhill",
    "BSD-3-Clause": "kiloji",
    "public domain": "goudybookletter prociono tuffy",
}
MARKS = {  # what the copyright file of a package has to say
    "OFL-1.1": "OFL|Open Font", "OFL-1.0": "OFL|Open Font", "Apache-2.0": "Apache", "CC-BY-3.0": "CC-BY|Attribution",
    "Bitstream Vera and public domain": "Bitstream", "MIT": "MIT|Expat|Permission is hereby granted",
    "BSD-3-Clause": "BSD|Redistribution and use", "public domain": "(?i)public.domain",
}  # fmt: skip
EXTRA_STYLES = {"Thin", "Light", "Black", "Condensed", "CondensedBold"}  # of the 1,540 files in fonts-noto-extra

# All @iconify-json packages of the registry with an allowed licence, but for logos, programming languages and animations.
ICON_PACKAGES = """
    akar-icons@1.2.7 ant-design@1.2.9 basil@1.2.4 bi@1.2.7 bitcoin-icons@1.2.5 bx@1.2.3 bxs@1.2.3 bytesize@1.2.2
    carbon@1.2.29 charm@1.2.3 ci@1.2.2 cif@1.2.7 cil@1.2.3 circle-flags@1.2.11 clarity@1.2.4 codicon@1.2.74 cuida@1.2.5
    duo-icons@1.2.2 ei@1.2.2 el@1.2.2 emojione@1.2.3 emojione-monotone@1.2.1 eos-icons@1.2.4 ep@1.2.4 eva@1.2.3 f7@1.2.2
    fa@1.2.2 fa-regular@1.2.2 fa-solid@1.2.2 fa6-regular@1.2.4 fa6-solid@1.2.4
    fa7-regular@1.2.3 fa7-solid@1.2.5 famicons@1.2.2 fe@1.2.4 feather@1.2.1 flag@1.2.12 flagpack@1.2.8
    flat-color-icons@1.2.3 flowbite@1.2.7 fluent@1.2.60 fluent-color@1.2.21 fluent-emoji@1.2.7 fluent-emoji-flat@1.2.6
    fluent-emoji-high-contrast@1.2.6 fluent-mdl2@1.2.1 fontisto@1.2.1 formkit@1.2.2 fxemoji@1.2.2 game-icons@1.2.4
    garden@1.2.6 gg@1.2.2 gis@1.2.5 gravity-ui@1.2.15 grommet-icons@1.2.4 guidance@1.2.2 healthicons@1.2.13
    heroicons@1.2.3 heroicons-outline@1.2.1 heroicons-solid@1.2.1 hugeicons@1.2.35 humbleicons@1.2.20 ic@1.2.4
    icon-park@1.2.4 icon-park-outline@1.2.4 icon-park-solid@1.2.4 icon-park-twotone@1.2.4 iconamoon@1.2.2 iconoir@1.2.11
    icons8@1.2.1 ion@1.2.7 ix@1.2.12 jam@1.2.3 la@1.2.1 lets-icons@1.2.2 lineicons@1.2.6 lsicon@1.2.5 lucide@1.2.137
    lucide-lab@1.2.3 mage@1.2.4 majesticons@1.2.5 maki@1.2.5 map@1.2.2 material-symbols@1.2.93
    material-symbols-light@1.2.94 mdi@1.2.3 mdi-light@1.2.2 medical-icon@1.2.0 meteocons@1.2.4 meteor-icons@1.2.8 mi@1.2.2
    mingcute@1.2.8 mynaui@1.2.19 nimbus@1.2.1 noto@1.2.9 noto-v1@1.2.5 octicon@1.2.36 oi@1.2.0 ooui@1.2.24 oui@1.2.6
    pajamas@1.2.15 pepicons-pencil@1.2.4 pepicons-pop@1.2.4 pepicons-print@1.2.2 ph@1.2.2 pixel@1.2.2 pixelarticons@1.2.9
    prime@1.2.5 proicons@1.2.20 qlementine-icons@1.2.16 quill@1.2.4 radix-icons@1.2.6 raphael@1.2.1 ri@1.2.10
    rivet-icons@1.2.2 si@1.2.17 simple-line-icons@1.2.1 solar@1.2.13 stash@1.2.4 streamline@1.2.5 streamline-emojis@1.2.4
    streamline-flex@1.2.3 streamline-freehand-color@1.2.2 streamline-pixel@1.2.0 streamline-plump@1.2.0
    streamline-ultimate@1.2.2 streamline-ultimate-color@1.2.2 system-uicons@1.2.4 tabler@1.2.41 tdesign@1.2.19
    teenyicons@1.2.2 twemoji@1.2.5 uil@1.2.3 uim@1.2.3 uis@1.2.3 uiw@1.2.4 vaadin@1.2.1 weui@1.2.4 wi@1.2.1 wpf@1.2.0
    zondicons@1.2.2"""
# Handwriting of the registry's @fontsource packages (Google Fonts): one weight of each, in its Latin, Cyrillic and Greek parts.
HAND_PACKAGES = """
    aguafina-script@5.3.0 alex-brush@5.3.0 allison@5.3.0 allura@5.3.0 amatic-sc@5.3.0 amita@5.2.8
    annie-use-your-telescope@5.3.0 architects-daughter@5.3.0 arizonia@5.3.0 babylonica@5.3.0 bad-script@5.3.0 ballet@5.3.0
    beth-ellen@5.3.0 bilbo@5.3.0 bilbo-swash-caps@5.3.0 birthstone@5.3.0 birthstone-bounce@5.3.0 bonheur-royale@5.3.0
    borel@5.3.0 butterfly-kids@5.3.0 calligraffitti@5.3.0 caramel@5.3.0 carattere@5.2.8 cause@5.3.0 caveat@5.3.0
    caveat-brush@5.3.0 cedarville-cursive@5.3.0 charm@5.2.7 charmonman@5.2.7 clicker-script@5.3.0 comforter@5.2.8
    comforter-brush@5.3.0 coming-soon@5.3.0 cookie@5.3.0 corinthia@5.3.0 courgette@5.3.0 covered-by-your-grace@5.3.0
    crafty-girls@5.3.0 damion@5.3.0 dawning-of-a-new-day@5.3.0 dekko@5.3.0 delicious-handrawn@5.3.0 delius@5.3.0
    delius-swash-caps@5.3.0 delius-unicase@5.3.0 dr-sugiyama@5.3.0 eagle-lake@5.3.0 edu-au-vic-wa-nt-hand@5.3.0
    edu-au-vic-wa-nt-pre@5.3.0 edu-nsw-act-cursive@5.3.0 edu-nsw-act-foundation@5.3.0 edu-nsw-act-hand-pre@5.3.0
    edu-qld-beginner@5.3.0 edu-qld-hand@5.3.0 edu-sa-beginner@5.3.0 edu-sa-hand@5.3.0 edu-tas-beginner@5.3.0
    edu-vic-wa-nt-beginner@5.3.0 edu-vic-wa-nt-hand@5.3.0 engagement@5.3.0 ephesis@5.3.0 estonia@5.0.20 explora@5.3.0
    felipa@5.3.0 festive@5.3.0 fleur-de-leah@5.2.8 fondamento@5.3.0 fuggles@5.3.0 fuzzy-bubbles@5.3.0
    gloria-hallelujah@5.3.0 gochi-hand@5.3.0 grand-hotel@5.3.0 grape-nuts@5.3.0 great-vibes@5.3.0 grechen-fuemen@5.3.0
    grey-qo@5.0.21 gwendolyn@5.3.0 handlee@5.3.0 herr-von-muellerhoff@5.3.0 homemade-apple@5.3.0 hurricane@5.3.0
    imperial-script@5.2.8 indie-flower@5.3.0 ingrid-darling@5.3.0 inspiration@5.2.7 island-moments@5.2.8 italianno@5.3.0
    itim@5.3.0 jim-nightshade@5.1.1 just-another-hand@5.3.0 just-me-again-down-here@5.3.0 kalam@5.3.0 kapakana@5.3.0
    kavivanar@5.3.0 kings@5.3.0 kolker-brush@5.3.0 la-belle-aurore@5.3.0 lakki-reddy@5.3.0 league-script@5.2.8
    licorice@5.3.0 love-light@5.3.0 loved-by-the-king@5.3.0 lovers-quarrel@5.3.0 luxurious-script@5.3.0 mali@5.3.0
    mansalva@5.3.0 marck-script@5.3.0 mea-culpa@5.3.0 meddon@5.3.0 meie-script@5.3.0 meow-script@5.3.0 merienda@5.3.0
    miss-fajardose@5.3.0 monsieur-la-doulaise@5.3.0 montez@5.3.0 moon-dance@5.0.5 mr-bedfort@5.3.0
    mr-dafoe@5.3.0 mr-de-haviland@5.3.0 mrs-saint-delafield@5.3.0 ms-madi@5.3.0 my-soul@5.1.0 mynerve@5.3.0
    neonderthaw@5.3.0 nerko-one@5.3.0 neucha@5.3.0 niconne@5.3.0 norican@5.3.0 nothing-you-could-do@5.3.0 oooh-baby@5.3.0
    over-the-rainbow@5.3.0 pacifico@5.3.0 pangolin@5.3.0 parisienne@5.3.0 passions-conflict@5.2.8 patrick-hand@5.3.0
    patrick-hand-sc@5.3.0 permanent-marker@5.3.0 petit-formal-script@5.3.0 pinyon-script@5.3.0 playwrite-at@5.3.0
    playwrite-au-qld@5.3.0 playwrite-br@5.3.0 playwrite-cu@5.3.0 playwrite-de-grund@5.3.0 playwrite-de-sas@5.2.7
    playwrite-es@5.3.0 playwrite-fr-moderne@5.3.0 playwrite-hr-lijeva@5.3.0 playwrite-ie@5.3.0 playwrite-in@5.3.0
    playwrite-it-moderna@5.3.0 playwrite-nl@5.3.0 playwrite-pl@5.3.0 playwrite-us-modern@5.3.0 playwrite-us-trad@5.3.0
    playwrite-za@5.3.0 princess-sofia@5.3.0 puppies-play@5.3.0 quintessential@5.3.0 qwigley@5.2.8 qwitcher-grypen@5.3.0
    rancho@5.3.0 redressed@5.3.0 reenie-beanie@5.3.0 rochester@5.3.0 rock-salt@5.3.0 romanesco@5.3.0 rouge-script@5.3.0
    ruthie@5.3.0 sacramento@5.3.0 sassy-frass@5.3.0 satisfy@5.3.0 schoolbell@5.3.0 sedgwick-ave@5.3.0
    sedgwick-ave-display@5.3.0 send-flowers@5.3.0 shadows-into-light@5.3.0 shadows-into-light-two@5.3.0 short-stack@5.3.0
    slackside-one@5.3.0 smooch@5.3.0 sofia@5.3.0 solitreo@5.3.0 splash@5.3.0 square-peg@5.3.0 sriracha@5.3.0 stalemate@5.3.0
    style-script@5.3.0 sue-ellen-francisco@5.3.0 sunshiney@5.3.0 swanky-and-moo-moo@5.3.0 tangerine@5.3.0
    the-girl-next-door@5.3.0 the-nautigal@5.2.7 twinkle-star@5.3.0 updock@5.3.0 vibur@5.3.0 vujahday-script@5.3.0
    waiting-for-the-sunrise@5.3.0 walter-turncoat@5.3.0 water-brush@5.3.0 waterfall@5.1.1 whisper@5.3.0 windsong@5.3.0
    yellowtail@5.3.0 yesteryear@5.3.0 zeyada@5.3.0"""
HAND_PARTS = {"latin", "latin-ext", "cyrillic", "cyrillic-ext", "greek"}
FLAG_SETS = {"cif", "circle-flags", "flag", "flagpack"}  # their names are country codes

NUMBER_WORDS = set(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million billion first
    second third fourth fifth sixth seventh eighth ninth tenth half halves quarter quarters double triple quadruple dozen
    digit digits number numbers numbered numbering numeral numerals numeric numerical numerator denominator fraction fractions
    num nums count counts counter counters counting""".split()
)
SHOWS_DIGITS = set(  # words of names whose pictures tend to show digits
    """
    calendar calendars date dates datetime day days today week weeks weekly month monthly year yearly daily event events agenda
    schedule scheduled scheduler appointment reservation deadline july birthday
    clock clocks oclock watch watches smartwatch alarm alarms alarmclock timer timers stopwatch time times hour hours minute
    minutes history recent
    dice die domino casino lottery bingo raffle jackpot slot slots poker roulette gambling gamble sudoku crossword mahjong
    playing joker ace spade spades suit billiard billiards pool snooker
    calculator calculate calc calculation math maths mathematics equation formula arithmetic percent percentage percentages
    discount sale decimal decimals integer float pi root superscript subscript exponent sup sub footnote sum
    keypad keycap dialpad dialer dial telephone numpad pad pin otp password passcode abc alphabet alphabetical input
    letter letters latin symbols
    medal medals rank ranks ranking rankings podium leaderboard score scores scoreboard trophy award awards winner champion prize
    place ordered sort sorting sorted order ordering az heading headline headings title h version versions
    speed speedometer odometer tachometer gauge gauges dashboard meter meters mileage limit ruler rulers measure measurement
    measuring scale scales weight temperature thermometer thermostat degree degrees fever ratio resolution dpi fps iso exposure
    aperture quality hdr age adult kid underage binary bits matrix random rating rate level levels step steps stage phase chapter
    episode season priority floor page pages pagination paging statistics stats plate license jersey shirt racing race racer
    barcode price cost coin coins cash banknote banknotes creditcard bill bills money credit debit
    blackboard chalkboard whiteboard teacher school education quiz exam grade grades milestone route highway interstate
    motorway zip postal postcode cinema clapper clapperboard clapboard film fuel microwave oven radio pressure
    cancer infinity mp mpeg km kmh mph px hz html css js gb mb kb hd sd uhd lte edge gprs serial sequence increment
    decrement quantity amount total tally abacus ol metronome pager beeper fax
    tty once skip rewind replay timelapse infinite uv calender""".split()
)
STYLES = set("outline outlined fill filled solid duotone twotone rounded sharp".split())  # affixes in any set
MAYBE_STYLES = set(  # affixes where the set holds the name without them, or with another one
    """
    line linear bold light thin regular round alt o broken remix variant baseline block pop medium heavy simple glyph ltr rtl
    color dark negative twotones lined straight stroke""".split()
)
SIZE = re.compile(r"^(8|10|11|12|15|16|18|20|24|28|32|36|40|48|64|96|24px|1x1|4x3)$")
PHRASES = re.compile(r"(^|-)(road-sign|street-sign|bar-code|high-definition)(-|$)")  # so do these
PEOPLE = re.compile(r"^(man|woman|men|women|person|people|family|couple|kiss)-|-(man|woman|person)$")  # one figure, many trades
TONES = re.compile(r"(^|-)(skin-tone|tone|(medium-)?(light|dark)-(light|medium|dark)|(medium-)(light|dark))(-|$)")


@dataclass(frozen=True)
class Drawing:
    """A picture of SIDE x SIDE pixels, grey (mode L) or RGB, and where it is from.

    Args:
        pixels: uint8, (SIDE, SIDE) or (SIDE, SIDE, 3).
        source: package.
        style: drawings of one style, of two classes, can be compared: a font file, or an icon set and its affixes.
    """

    pixels: np.ndarray
    source: str
    style: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha1(self.pixels.tobytes()).digest()


# ---- names


def has_number(words: Iterable[str]) -> bool:
    """Whether a word holds a digit or is a number word."""
    return any(re.search(r"\d", word) or word.lower() in NUMBER_WORDS for word in words)


def is_class(char: str) -> bool:
    """Whether `char` may be a class: an undecomposable letter with nothing of a number in its value or name."""
    name = unicodedata.name(char, "")
    numeric = unicodedata.numeric(char, None) is not None or has_number(re.findall("[A-Z0-9]+", name))
    return bool(name) and not numeric and unicodedata.category(char)[0] == "L" and not unicodedata.decomposition(char)


def is_picture(name: str) -> bool:
    """Whether a hyphenated name may be that of a picture class: no number, nothing that tends to show digits."""
    words = name.split("-")
    lone = len(name) < 3 and not name.startswith("flag-")
    refused = has_number(words) or SHOWS_DIGITS & set(words) or any(r.search(name) for r in (PHRASES, TONES, PEOPLE))
    return bool(name) and not lone and not refused


def icon_classes(names: Iterable[str], prefixes: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """The class and the style of each icon of a set whose name, without affixes of style and size, may be a class.

    Args:
        names: of the icons of one set.
        prefixes: of style, as the set itself declares them.
    """
    every = set(names)
    sized = sum(any(SIZE.match(word) for word in name.split("-")[-2:]) for name in every) > 0.2 * len(every)
    known = STYLES | MAYBE_STYLES
    bare = {re.sub(r"-\d+(px)?(?=-|$)", "", name) if sized else name for name in every}
    result = {}
    for name in sorted(every):
        words, style = name.split("-"), []
        while len(words) > 1:
            rest, last = "-".join(words[:-1]), words[-1]
            varied = last in MAYBE_STYLES and any(n in bare for n in (rest, *(f"{rest}-{o}" for o in known - {last})))
            if last in STYLES or varied or (sized and SIZE.match(last)):
                style.append(words.pop())
            elif words[0] in prefixes:
                style.append(words.pop(0))
            else:
                break
        if is_picture(stem := "-".join(words)):
            result[name] = (stem, "-".join(style))
    return result


def check_licence(package: str, licence: str) -> None:
    """Refuses a licence that is not on the list.

    Raises:
        SystemExit: naming package and licence.
    """
    if licence not in ALLOWED:
        raise SystemExit(
            f'{package} is licensed "{licence}", which is not one of {", ".join(sorted(ALLOWED))}: drop the package.'
        )


# ---- sources


def call(command: Sequence[str], folder: Path, remedy: str) -> None:
    """Runs a program in a folder.

    Raises:
        SystemExit: it is missing or fails; the message says so and gives the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed: {remedy}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}\n{remedy}")


def fetch_fonts(cache: Path) -> dict[str, Path]:
    """The unpacked Debian packages by name, fetched where the cache lacks them."""
    packages = [f"fonts-{name}" for names in FONT_PACKAGES.values() for name in names.split()]
    folders = {package: cache / "debian" / package for package in sorted(packages)}
    lacking = [package for package, folder in folders.items() if not folder.is_dir()]
    archives = cache / "deb"
    if download := [package for package in lacking if not list(archives.glob(f"{package}_*.deb"))]:
        remedy = "This recipe needs Debian's archive: run `apt-get update` as root once, on Debian 12 or later."
        call(["apt-get", "download", "-q", *download], archives, remedy)
    for package in tqdm(lacking, desc="unpack fonts"):
        archive = max(archives.glob(f"{package}_*.deb"))
        with whole_folder(folders[package]) as folder:
            call(["dpkg-deb", "-x", str(archive.resolve()), str(folder.resolve())], archives, f"Remove {archive} and try again.")
            (folder / "version").write_text(archive.name.split("_")[1].replace("%3a", ":"))
    return folders


def font_files(folders: dict[str, Path]) -> dict[Path, str]:
    """The font files of all packages, sorted, each with its package."""
    files = {}
    for package, folder in folders.items():
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".ttf", ".otf", ".ttc") and not p.is_symlink()):
            if package != "fonts-noto-extra" or path.stem.split("-")[-1] in EXTRA_STYLES:
                files[path] = package
    return files


def unpacked(path: Path, suffix: str) -> dict[str, bytes]:
    """The files of an npm package whose names end so, by name without the leading folder."""
    with tarfile.open(path) as archive:
        archive.extraction_filter = tarfile.data_filter
        members = [member for member in archive.getmembers() if member.isfile() and member.name.endswith(suffix)]
        contents = {member.name: archive.extractfile(member) for member in members}
        return {name.partition("/")[2]: content.read() for name, content in contents.items() if content is not None}


def pack(pins: dict[str, Path], cache: Path) -> None:
    """Fetches npm packages where the cache lacks them: their pins, and the files that npm makes of them."""
    lacking = [pin for pin, file in pins.items() if not file.exists()]
    for start in tqdm(range(0, len(lacking), 8), desc="fetch from npm", disable=not lacking):
        call(["npm", "pack", "--silent", *lacking[start : start + 8]], cache, "This recipe needs npm and its registry.")


def fetch_hands(cache: Path) -> tuple[dict[Path, str], list[dict[str, Any]]]:
    """The handwriting fonts, unpacked where the cache lacks them: the package of each file, and what each package says of itself.

    Raises:
        SystemExit: a licence is not allowed.
    """
    folder = cache / "npm"
    pins = {f"@fontsource/{pin}": folder / f"fontsource-{pin.replace('@', '-')}.tgz" for pin in HAND_PACKAGES.split()}
    pack(pins, folder)
    files, packages = {}, []
    for pin, file in pins.items():
        about = json.loads(unpacked(file, "metadata.json")["metadata.json"])
        check_licence(pin, about["license"]["type"])
        packages.append({"pin": pin, "about": about})
        weight = 400 if 400 in about["weights"] else min(about["weights"])
        target = cache / "hands" / about["id"]
        if not target.is_dir():
            contents = unpacked(file, f"-{weight}-normal.woff")
            with whole_folder(target) as fonts:
                for part in sorted(HAND_PARTS & set(about["subsets"])):
                    name = f"{about['id']}-{part}"
                    (fonts / f"{name}.woff").write_bytes(contents[f"files/{name}-{weight}-normal.woff"])
        files |= {path: pin for path in sorted(target.glob("*.woff"))}
    return files, packages


def fetch_icons(cache: Path) -> list[dict[str, Any]]:
    """The icon sets: pin, info, icons and prefixes of each, fetched where the cache lacks them.

    Raises:
        SystemExit: a licence is not allowed.
    """
    folder = cache / "npm"
    pinned = {pin: folder / f"iconify-json-{pin.replace('@', '-')}.tgz" for pin in ICON_PACKAGES.split()}
    pack({f"@iconify-json/{pin}": file for pin, file in pinned.items()}, folder)
    sets = []
    for pin, file in pinned.items():
        read = {Path(name).stem: json.loads(text) for name, text in unpacked(file, ".json").items()}
        info, meta = read["info"], read.get("metadata", {})
        check_licence(pin, info["license"].get("spdx", "none"))
        sets.append({"pin": pin, "info": info, "icons": read["icons"], "prefixes": set(meta.get("prefixes") or {})})
    return sets


# ---- drawing


def fit(picture: Image.Image) -> Image.Image:
    """The picture scaled, its aspect kept, to SIDE less the margins on its longer side."""
    scale = (SIDE - 2 * MARGIN) / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)


def framed(picture: Image.Image) -> np.ndarray:
    """A fitted picture in the middle of a white square."""
    square = Image.new(picture.mode, (SIDE, SIDE), "white")
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(square)


def ink(font: ImageFont.FreeTypeFont, char: str) -> Image.Image | None:
    """`char` in white on black, cut to its box; None where nothing is drawn."""
    left, top, right, bottom = font.getbbox(char)
    if not (0 < right - left < 5 * font.size and 0 < bottom - top < 5 * font.size):
        return None
    canvas = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), char, fill=255, font=font)
    box = canvas.getbbox()
    return canvas.crop(box) if box else None


def draw_glyph(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray | None:
    """`char` in black on white; None where nothing is drawn."""
    cut = ink(font, char)
    return None if cut is None else framed(fit(cut.point(lambda value: 255 - value)))


def draw_pen(font: ImageFont.FreeTypeFont, char: str, rng: np.random.Generator, side: int = 128) -> np.ndarray | None:
    """`char` as a round pen would draw it: its skeleton, bent smoothly, in strokes of one width.

    None where there is no ink, or too much to follow.
    """
    from scipy.ndimage import distance_transform_edt, map_coordinates
    from skimage.morphology import skeletonize

    cut = ink(font, char)
    if cut is None:
        return None
    scale = side / max(cut.size)
    cut = cut.resize([max(1, round(length * scale)) for length in cut.size], Image.Resampling.BOX)
    points = np.argwhere(skeletonize(np.pad(np.asarray(cut) > 127, 2))).astype(float)
    if not 10 < len(points) < 6 * side:
        return None
    points -= points.mean(0)
    angle, shear, stretch = rng.normal(0, 0.08), rng.normal(0, 0.12), np.exp(rng.normal(0, 0.1))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    bent = points @ turn @ np.array([[1, shear], [0, 1]]) * [1, stretch]
    knots = rng.normal(0, 0.03 * side, (2, 4, 4))
    where = (points / side + 0.5).clip(0, 1).T * 3
    bent += np.stack([map_coordinates(plane, where, order=3, mode="nearest") for plane in knots], 1)
    radius = rng.uniform(0.025, 0.085) * side
    low, high = bent.min(0) - radius - 2, bent.max(0) + radius + 2
    shape = np.ceil(high - low).astype(int) + 1
    blank = np.ones(shape, bool)
    blank[tuple(np.round(bent - low).astype(int).T)] = False
    drawn = (distance_transform_edt(blank) - radius + 0.5).clip(0, 1)
    box = Image.fromarray(np.uint8(255 - 255 * drawn)).getbbox()
    return framed(fit(Image.fromarray(np.uint8(255 * drawn)).crop(box))) if box else None


def draw_svg(icon: dict[str, Any]) -> np.ndarray | None:
    """An Iconify icon on white, black where it says currentColor; None where hardly anything is to be seen.

    Args:
        icon: with `body`, and `left`, `top`, `width` and `height` of its box.
    """
    import resvg_py

    box = [icon.get(key, default) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]

    def render(side: int) -> Image.Image | None:
        width, height = (max(1, round(length * side / max(box[2:]))) for length in box[2:])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'viewBox="{" ".join(map(str, box))}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        data = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        visible = picture.getchannel("A").point(lambda value: 255 * (value > 8)).getbbox()
        return picture.crop(visible) if visible else None

    cut = render(128)
    if cut is not None and max(cut.size) < 2 * (SIDE - 2 * MARGIN):
        cut = render(512)
    if cut is None:
        return None
    white = Image.new("RGBA", cut.size, "white")
    white.alpha_composite(cut)
    pixels = framed(fit(white.convert("RGB")))
    if pixels.std() < 12:
        return None
    grey = int(np.ptp(pixels.astype(int), axis=2).max()) < 8
    return pixels[:, :, 0].copy() if grey else pixels


# ---- classes


def letters(files: dict[Path, str], hands: dict[Path, str], seed: int) -> dict[str, list[Drawing]]:
    """Drawings by letter: at most PER_SCRIPT letters of a script, each with LEAST to MOST fonts, up to HANDS hands, and pens.

    The first six fonts of a letter follow one order for all letters, so that letters can be compared; the rest are drawn.
    """
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise SystemExit("fonttools is not installed: pip install fonttools resvg-py scikit-image") from error

    holders: dict[str, list[Path]] = collections.defaultdict(list)
    order = np.random.default_rng([seed, 1]).permutation(len(files))
    names = list(files)
    writers: dict[str, list[Path]] = collections.defaultdict(list)
    for table, paths in ((holders, [names[index] for index in order]), (writers, list(hands))):
        for path in tqdm(paths, desc="read fonts"):
            with TTFont(path, lazy=True, fontNumber=0) as font:
                for code in sorted(font.getBestCmap() or {}):
                    if code > 32 and is_class(chr(code)):
                        table[chr(code)].append(path)
    scripts: dict[str, list[str]] = collections.defaultdict(list)
    for char in sorted(holders):
        if len(holders[char]) >= LEAST:
            scripts[unicodedata.name(char).split()[0]].append(char)
    rng = np.random.default_rng([seed, 2])
    chosen = sorted(str(char) for chars in scripts.values() for char in rng.permutation(chars)[:PER_SCRIPT])

    @functools.cache
    def load(file: Path, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)

    drawn: dict[str, dict[bytes, Drawing]] = {}

    def add(char: str, file: Path, source: str) -> None:
        pixels = draw_glyph(load(file, 96), char)
        if pixels is not None and pixels.std() > 8:
            drawing = Drawing(pixels, source, str(file))
            drawn[char].setdefault(drawing.digest, drawing)

    for char in tqdm(chosen, desc="draw letters"):
        families: dict[str, list[Path]] = collections.defaultdict(list)
        for file in holders[char]:
            families[file.stem.split("-")[0]].append(file)
        turns = [f for _, _, f in sorted((turn, i, f) for i, fs in enumerate(families.values()) for turn, f in enumerate(fs))]
        rng = np.random.default_rng([seed, 3, ord(char)])
        drawn[char] = {}
        for file in turns[:6] + [turns[6:][index] for index in rng.permutation(len(turns[6:]))]:
            if len(drawn[char]) < MOST:
                add(char, file, files[file])
        for file in [writers[char][index] for index in rng.permutation(len(writers[char]))[:HANDS]]:
            add(char, file, hands[file])
    uses = collections.Counter((d.style, digest) for own in drawn.values() for digest, d in own.items())
    result = {}
    for char, own in tqdm(drawn.items(), desc="draw with pens"):
        drawings = [d for digest, d in own.items() if uses[d.style, digest] < PLACEHOLDER]
        if len(drawings) < LEAST:
            continue
        rng = np.random.default_rng([seed, 10, ord(char)])
        pens: list[Drawing] = []
        most = max(PENS, len(drawings) // PENS_SHARE)
        for drawing in [drawings[index] for index in rng.permutation(len(drawings))]:
            pixels = draw_pen(load(Path(drawing.style), 128), char, rng) if len(pens) < most else None
            pens += [] if pixels is None else [Drawing(pixels, drawing.source, "pen")]
        result[char] = drawings + pens
    return result


def family(prefix: str) -> str:
    """Icon sets of one family draw alike: material-symbols and material-symbols-light, fa and fa-solid, bx and bxs."""
    return {"bxs": "bx", "uim": "uil", "uis": "uil", "ic": "material", "mdi": "mdi"}.get(prefix, re.sub(r"\d|-.*", "", prefix))


def pictures(sets: list[dict[str, Any]], seed: int) -> dict[str, list[Drawing]]:
    """Drawings by picture class: names in at least FAMILIES families of icon sets, LEAST to MOST drawings in turn."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise SystemExit("resvg-py is not installed: pip install fonttools resvg-py scikit-image") from error

    order = np.random.default_rng([seed, 4]).permutation(len(sets))
    holders: dict[str, dict[str, list[tuple[str, str]]]] = collections.defaultdict(dict)
    by_prefix = {icons["info"]["prefix"]: icons for icons in sets}
    for index in order:
        icons = sets[index]
        prefix = icons["info"]["prefix"]
        emoji = "emoji" in prefix or icons["info"].get("category") == "Emoji"
        for name, (stem, style) in icon_classes(icons["icons"]["icons"], icons["prefixes"]).items():
            if prefix in FLAG_SETS:
                stem = f"flag-{stem}"
            elif emoji and (stem.startswith("flag-") or re.search("light|dark|medium", style)):
                continue  # the country sets hold the same flags; the rest are tones of skin
            if not icons["icons"]["icons"][name].get("hidden"):
                holders[stem].setdefault(prefix, []).append((name, style))
    result = {}
    for stem in tqdm(sorted(holders), desc="draw pictures"):
        by_set = holders[stem]
        if len({family(prefix) for prefix in by_set}) < FAMILIES or sum(map(len, by_set.values())) < LEAST:
            continue
        turns = []
        for place, (prefix, found) in enumerate(by_set.items()):
            styles: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
            for name, style in sorted(found):
                styles[re.sub(r"\d+(px)?-?", "", style)].append((name, style))
            rng = np.random.default_rng([seed, 5, *stem.encode(), place])
            picked = [group[int(rng.integers(len(group)))] for group in styles.values()][:PER_ICON_SET]
            turns += [(turn, place, prefix, name, style) for turn, (name, style) in enumerate(picked)]
        drawn: dict[bytes, Drawing] = {}
        for _, _, prefix, name, style in sorted(turns):
            if len(drawn) >= MOST:
                break
            icons = by_prefix[prefix]
            defaults = {key: icons["icons"][key] for key in ("left", "top", "width", "height") if key in icons["icons"]}
            pixels = draw_svg(defaults | icons["icons"]["icons"][name])
            if pixels is not None:
                drawing = Drawing(pixels, f"@iconify-json/{icons['pin']}", f"{prefix}/{style}")
                drawn.setdefault(drawing.digest, drawing)
        if len(drawn) >= LEAST and len({family(d.style.split("/")[0]) for d in drawn.values()}) >= FAMILIES:
            result[stem] = list(drawn.values())
    return result


def distinct(classes: dict[str, list[Drawing]], threshold: float) -> tuple[dict[str, list[Drawing]], list[tuple[str, str]]]:
    """The classes without look-alikes of an earlier one, and the pairs (left out, kept).

    Two classes look alike when, in at least half of the styles that hold both, their drawings correlate by `threshold`.
    """
    names = list(classes)
    styles: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
    for index, name in enumerate(names):
        for drawing in classes[name]:
            if drawing.style != "pen":
                styles[drawing.style].setdefault(index, drawing.pixels)
    alike: collections.Counter[tuple[int, int]] = collections.Counter()
    for held in tqdm(styles.values(), desc="compare"):
        rows = np.array(sorted(held))
        vectors = np.stack([np.asarray(Image.fromarray(held[i]).convert("L").reduce(2), np.float32).ravel() for i in rows])
        vectors -= vectors.mean(1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
        first, second = np.nonzero(np.triu(vectors @ vectors.T > threshold, 1))
        alike.update(zip(rows[first].tolist(), rows[second].tolist(), strict=True))
    held_by: dict[int, set[str]] = collections.defaultdict(set)
    for style, held in styles.items():
        for index in held:
            held_by[index].add(style)
    earlier: dict[int, list[int]] = collections.defaultdict(list)
    for (first, second), hits in alike.items():
        if 2 * hits >= len(held_by[first] & held_by[second]):
            earlier[second].append(first)
    kept: set[int] = set()
    pairs = []
    for index in range(len(names)):
        if twins := [other for other in earlier[index] if other in kept]:
            pairs.append((names[index], names[twins[0]]))
        else:
            kept.add(index)
    return {names[index]: classes[names[index]] for index in sorted(kept)}, pairs


def split(classes: dict[str, list[Drawing]], seed: int, count: int) -> tuple[list[str], list[str]]:
    """The names of trained and of held-out classes: `count` of those with HELD_OUT_LEAST drawings, drawn by the seed."""
    rich = [name for name, drawings in classes.items() if len(drawings) >= HELD_OUT_LEAST]
    if len(rich) < count:
        raise SystemExit(f"{count} classes are to be held out, but only {len(rich)} have {HELD_OUT_LEAST} drawings.")
    held = {rich[index] for index in np.random.default_rng([seed, 6]).permutation(len(rich))[:count]}
    return [name for name in classes if name not in held], [name for name in classes if name in held]


# ---- writing


def label_of(name: str, kind: str) -> str:
    """The class name that a user reads: a letter's Unicode name, or "picture: house"."""
    return unicodedata.name(name) if kind == "glyph" else f"picture: {name.replace('-', ' ')}"


def png(pixels: np.ndarray) -> bytes:
    """The pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: Sequence[tuple[int, str, Drawing]], names: list[str]) -> None:
    """Writes rows of (label, kind, drawing) for the `datasets` library."""
    columns = {
        "image": [{"bytes": png(drawing.pixels), "path": None} for _, _, drawing in rows],
        "label": [label for label, _, _ in rows],
        "kind": [kind for _, kind, _ in rows],
        "source": [drawing.source for _, _, drawing in rows],
    }
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=names), "kind": Value("string"), "source": Value("string")}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(path)


def write_set(out: Path, kinds: dict[str, dict[str, list[Drawing]]], seed: int, held_out: int = HELD_OUT) -> dict[str, Any]:
    """Writes the trained and held-out classes of each kind ("glyph", "picture") and gives the counts."""
    rows: list[tuple[int, str, Drawing]] = []
    names: list[str] = []
    listed: dict[str, Any] = {}
    facts: dict[str, Any] = {"seed": seed}
    for kind, classes in kinds.items():
        trained, held = split(classes, seed, held_out)
        for name in trained:
            rows += [(len(names), kind, drawing) for drawing in classes[name]]
            names.append(label_of(name, kind))
        held_names = [label_of(name, kind) for name in held]
        parts: dict[str, list[tuple[int, str, Drawing]]] = {"train": [], "test": []}
        for label, name in enumerate(held):
            order = np.random.default_rng([seed, 7, *name.encode()]).permutation(len(classes[name]))
            for place, index in enumerate(order):
                parts["train" if place < HELD_OUT_TRAIN else "test"].append((label, kind, classes[name][index]))
        for part, part_rows in parts.items():
            write_parquet(out / f"held_out_{kind}s" / f"{part}.parquet", part_rows, held_names)
        join = "".join if kind == "glyph" else list
        listed[f"{kind}s"] = {"trained": join(trained), "held_out": join(held)}
        facts[f"{kind}s"] = {
            "trained_classes": len(trained),
            "trained_drawings": sum(len(classes[name]) for name in trained),
            "held_out_classes": len(held),
            "held_out_train": len(parts["train"]),
            "held_out_test": len(parts["test"]),
        }
    shards = -(-len(rows) // SHARD)
    for shard in range(shards):
        part_rows = rows[shard * SHARD : (shard + 1) * SHARD]
        write_parquet(out / "train" / f"train-{shard:05d}-of-{shards:05d}.parquet", part_rows, names)
    images = np.empty((len(rows), SIDE, SIDE, 3), np.uint8)
    for place, (_, _, drawing) in enumerate(rows):
        images[place] = drawing.pixels if drawing.pixels.ndim == 3 else drawing.pixels[:, :, None]
    labels = np.array([label for label, _, _ in rows], np.int64)
    kinds_of = np.array([kind for _, kind, _ in rows])
    np.savez_compressed(out / "train.npz", images=images, labels=labels, class_names=np.array(names), kinds=kinds_of)
    write_json(out / "classes.json", listed)
    write_json(out / "facts.json", facts)
    return facts


def copyrights(folder: Path, package: str) -> tuple[str, str]:
    """The text of a Debian package's copyright file, and the holders that it names for the fonts."""
    text = (folder / "usr/share/doc" / package / "copyright").read_text(encoding="utf-8", errors="replace")
    holders: list[str] = []
    for stanza in re.split(r"\n\s*\n", text):
        files = re.search(r"^Files: *(.*)", stanza, re.MULTILINE)
        found = re.search(r"^Copyright: *((?:.*)(?:\n[ \t]+.*)*)", stanza, re.MULTILINE)
        if found and not (files and files[1].startswith("debian")):
            holders += [line.strip() for line in found[1].split("\n")]
    if not holders:
        holders = [line.strip(" .*") for line in re.findall(r"(?i)(?:copyright|\(c\)|©)[^\n]*\d{4}[^\n]*", text)]
    kept = dict.fromkeys(re.sub(r"\s+", " ", holder).replace("|", "/") for holder in holders if re.search(r"\w", holder))
    return text, "; ".join(list(kept)[:4])


def attribution(
    folders: dict[str, Path], packages: list[dict[str, Any]], sets: list[dict[str, Any]], taken: collections.Counter[str]
) -> Iterator[str]:
    """The lines of ATTRIBUTION.md: each source, its version, licence and holder, and how many drawings are from it.

    Raises:
        SystemExit: a font package's copyright file does not speak of the licence that it is listed with.
    """
    yield "# Where the drawings are from\n"
    yield f"Fonts, from Debian packages: {sum(taken[package] for package in folders):,} drawings of letters.\n"
    yield "| package | licence | copyright | drawings |\n|---|---|---|---|"
    licences = {f"fonts-{name}": licence for licence, names in FONT_PACKAGES.items() for name in names.split()}
    for package, folder in folders.items():
        text, holders = copyrights(folder, package)
        if not re.search(MARKS[licences[package]], text):
            raise SystemExit(f"{package}: its copyright file does not mention {licences[package]}. Read it and mend the list.")
        version = (folder / "version").read_text()
        yield f"| {package} {version} | {licences[package]} | {holders} | {taken[package]} |"
    number = sum(taken[package["pin"]] for package in packages)
    yield f"\nHandwriting fonts, from npm packages: {number:,} drawings of letters.\n"
    yield "| package | licence | copyright | drawings |\n|---|---|---|---|"
    for package in packages:
        terms, pin = package["about"]["license"], package["pin"]
        holder = re.sub(r"\s+", " ", terms["attribution"]).replace("|", "/")
        yield f"| {pin} | [{terms['type']}]({terms['url']}) | {holder} | {taken[pin]} |"
    yield "\nIcons, from npm packages of sets in Iconify's JSON format, drawn at 48 x 48 pixels and not changed otherwise.\n"
    yield "| package | set | licence | author | drawings |\n|---|---|---|---|---|"
    for icons in sets:
        info, licence = icons["info"], icons["info"]["license"]
        author = f"[{info['author']['name']}]({info['author'].get('url', '')})"
        terms = f"[{licence['spdx']}]({licence.get('url', '')})"
        number = taken[f"@iconify-json/{icons['pin']}"]
        yield f"| @iconify-json/{icons['pin']} | {info['name']} | {terms} | {author} | {number} |"


def sheet(path: Path, classes: dict[str, list[Drawing]], count: int, columns: int, seed: int) -> None:
    """Draws a PNG with `columns` drawings each of `count` classes drawn by the seed, and their names."""
    chosen = [list(classes)[i] for i in sorted(np.random.default_rng([seed, 8]).permutation(len(classes))[:count])]
    page = Image.new("RGB", (210 + columns * (SIDE + 2), count * (SIDE + 2)), "white")
    pen = ImageDraw.Draw(page)
    for row, name in enumerate(chosen):
        title = name if len(name) > 1 else unicodedata.name(name).lower()
        pen.text((4, row * (SIDE + 2) + 18), title[:34], fill="black")
        drawings = classes[name]
        picks = np.linspace(0, len(drawings) - 1, min(columns, len(drawings))).round().astype(int)
        for column, index in enumerate(picks):
            page.paste(Image.fromarray(drawings[index].pixels).convert("RGB"), (208 + column * (SIDE + 2), row * (SIDE + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def main(argv: list[str] | None = None) -> None:
    """Fetches the sources, draws, leaves out look-alikes and writes the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/upstream/set"))
    parser.add_argument("--cache", type=Path, default=Path("runs/upstream/cache"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples-sheet", type=Path, help="also draw examples of twelve classes of each kind into this PNG")
    args = parser.parse_args(argv)
    began = time.monotonic()
    sets = fetch_icons(args.cache)
    folders = fetch_fonts(args.cache)
    hands, packages = fetch_hands(args.cache)
    kinds, alike = {}, {}
    drawn = {"picture": pictures(sets, args.seed), "glyph": letters(font_files(folders), hands, args.seed)}
    rich_first = dict(sorted(drawn["picture"].items(), key=lambda item: (-len(item[1]), item[0])))
    for kind, classes in (("glyph", drawn["glyph"]), ("picture", rich_first)):
        kept, alike[kind] = distinct(classes, ALIKE[kind])
        kinds[kind] = dict(sorted(kept.items()))
    taken = collections.Counter(d.source for classes in kinds.values() for drawings in classes.values() for d in drawings)
    with whole_folder(args.out) as out:
        facts = write_set(out, kinds, args.seed)
        write_text(out / "ATTRIBUTION.md", "\n".join(attribution(folders, packages, sets, taken)) + "\n")
        write_json(out / "look_alikes.json", alike)
    if args.examples_sheet:
        both = {
            name: drawings
            for kind in kinds.values()
            for name, drawings in kind.items()
            if name in set(np.random.default_rng([args.seed, 9]).permutation([n for n in kind if len(kind[n]) > 9])[:12].tolist())
        }
        sheet(args.examples_sheet, both, len(both), 10, args.seed)
    print(json.dumps(facts, indent=2))
    print(f"{args.out} written in {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
