# ruff: noqa: RUF001 - letters that look alike are what names are made of
"""Fictitious names and form inputs.

Phone numbers are in ranges reserved for fiction, IP addresses in ranges reserved for documentation, and email addresses
in domains reserved for examples, so that no sample row refers to a real person.
"""

import unicodedata
from dataclasses import dataclass
from typing import Final

# Letters that do not decompose into a base letter and an accent.
_PLAIN_LETTERS: Final = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ß": "ss", "ı": "i", "æ": "ae", "þ": "th", "ð": "d", "œ": "oe"}
)


@dataclass(frozen=True)
class Name:
    """A name, and its form in an email address."""

    written: str
    handle: str


@dataclass(frozen=True)
class Culture:
    """First and last names that occur together."""

    first: tuple[Name, ...]
    last: tuple[Name, ...]


def _handle(written: str) -> str:
    decomposed = unicodedata.normalize("NFKD", written.lower().translate(_PLAIN_LETTERS))
    return "".join(letter for letter in decomposed if letter.isascii() and letter.isalpha())


def _names(listed: str) -> tuple[Name, ...]:
    """Parse names separated by commas. A name in another script is followed by its handle: `伟=wei`."""
    names = []
    for item in " ".join(listed.split()).split(", "):
        written, _, handle = item.partition("=")
        names.append(Name(written, handle or _handle(written)))
    return tuple(names)


ENGLISH: Final = Culture(
    _names(
        """James, Mary, Robert, Patricia, John, Jennifer, Michael, Linda, David, Elizabeth, William, Barbara, Richard,
        Susan, Joseph, Jessica, Thomas, Sarah, Keisha, DeShawn, Tamika, Marcus, Latoya, Tyrone, Mary Ann, Billy Joe,
        D'Andre, Ashley, Brandon, Brittany, Tyler, Megan, Sam, Al, J.R."""
    ),
    _names(
        """Smith, Johnson, Williams, Brown, Jones, Davis, Miller, Wilson, Moore, Taylor, Anderson, Jackson, Harris,
        Washington, Jefferson, Booker, McDonald, MacLeod, Smith-Jones, St. John, Van Buren, Baker III, Carter Jr.,
        Lee, Young, Hill, Green, Adams, Nelson, Ng"""
    ),
)
SPANISH: Final = Culture(
    _names(
        """José, María, Juan Carlos, Lucía, Ángel, Sofía, Íñigo, Belén, Andrés, Ximena, Raúl, María del Carmen, Óscar,
        Concepción, Iván, Inés, Peña, Jesús, Guadalupe, Begoña"""
    ),
    _names(
        """García, Rodríguez, Martínez, Hernández, López, González, Pérez, Sánchez, Ramírez, Núñez, García Márquez,
        de la Cruz, De León, Muñoz y Peña, Ibáñez, Vélez-Ortiz, del Río, Castañeda, Zúñiga, Ortega"""
    ),
)
FRENCH: Final = Culture(
    _names(
        """François, Zoë, Jean-Luc, Hélène, Anaïs, Benoît, Chloé, Éloïse, Gaël, Noëlle, Marie-Ève, Célestin, Aimée,
        Jean-Baptiste, Océane"""
    ),
    _names(
        """Lefèvre, Dubois, Le Goff, Bélanger, d'Aubigné, Desrosiers, Saint-Pierre, Lévesque, de La Tour, Côté,
        Gagné, Toussaint, L'Ouverture, Charbonneau, Noël"""
    ),
)
CENTRAL_EUROPEAN: Final = Culture(
    _names(
        """Jürgen, Käthe, Łukasz, Małgorzata, Zdeněk, Željko, Björn, Åse, Øyvind, Þóra, Ilse, Ágnes, Győző, Șerban,
        Žofie, Søren, Matthäus, Grażyna, Jiří"""
    ),
    _names(
        """Müller, Groß, von der Heide, Wójcik, Dvořák, Kovačević, Sjöström, Ødegård, Ásgeirsdóttir, Szabó, Ștefănescu,
        Weiß, van den Berg, Żółkiewski, Nagy, Jørgensen, Krüger-Schäfer, Hašek"""
    ),
)
IRISH_AND_CELTIC: Final = Culture(
    _names("Siobhán, Niamh, Pádraig, Órla, Seán, Caoimhe, Éamonn, Aoife, Rhys, Siân"),
    _names("O'Brien, O’Connor, Ní Dhuibhne, Mac Giolla Phádraig, Fitzgerald, Ó Súilleabháin, ap Rhys, D'Arcy"),
)
VIETNAMESE: Final = Culture(
    _names("Thị Hương, Văn Đức, Anh, Ngọc Ánh, Minh, Quỳnh, Tuấn, Hồng Nhung, Đạt, Bích"),
    _names("Nguyễn, Trần, Lê, Phạm, Huỳnh, Võ, Đặng, Bùi, Đỗ, Ngô"),
)
TURKISH: Final = Culture(
    _names("İlker, Işıl, Çağlar, Özge, Şule, Ümit, Gülşen, Emre, Tuğba, Ömer"),
    _names("Yılmaz, Işık, Öztürk, Çelik, Şahin, Doğan, İnönü, Kılıç, Güneş, Aydın"),
)
WEST_AFRICAN: Final = Culture(
    _names("Olúwaṣeun, Adaeze, Chukwuemeka, Ngozi, Kwabena, Akosua, Babátúndé, Ifẹ́, Mamadou, Aïssatou"),
    _names("Adéyẹmí, Okonkwo, Nwachukwu, Mensah, Diop, N'Diaye, Owusu-Ansah, Balogun, Ọlátúnjí, Eze"),
)
PACIFIC: Final = Culture(
    _names("Kealoha, Leilani, Kaʻiulani, Sione, Mele, Keoni, Hōkū, Anahera, Wiremu, Lāhela"),
    _names("Kahananui, Kamakawiwoʻole, Tuʻipulotu, Faleolo, Ngāta, Kealoha, Māhoe, Keawe, Taufaʻāhau, Nāone"),
)
SOUTH_ASIAN: Final = Culture(
    _names("Aarav, Priyanka, Sandeep, Lakshmi, Mohammed, Ayesha, Rajesh, Deepika, Gurpreet, Nusrat, Abdul Rahman"),
    _names("Patel, Singh, Kaur, Venkataraman, Chatterjee, Khan, Hossain, Iyer, Desai, Wickramasinghe, ul-Haq, Rao"),
)
OTHER_SCRIPTS: Final = Culture(
    _names(
        """伟=wei, 小芳=xiaofang, 秀英=xiuying, さくら=sakura, 健太=kenta, 지훈=jihoon, 서연=seoyeon,
        Олександр=oleksandr, Наталія=nataliia, Γιώργος=giorgos, Ελένη=eleni, محمد=mohammed, فاطمة=fatima,
        דוד=david, अनीता=anita"""
    ),
    _names(
        """王=wang, 欧阳=ouyang, 李=li, 田中=tanaka, 佐々木=sasaki, 김=kim, 박=park, Шевченко=shevchenko,
        Ковальчук=kovalchuk, Παπαδόπουλος=papadopoulos, الحسن=alhassan, כהן=cohen, शर्मा=sharma"""
    ),
)

#: How often each culture occurs, as shares of a whole.
CULTURES: Final = {
    ENGLISH: 44,
    SPANISH: 20,
    FRENCH: 5,
    CENTRAL_EUROPEAN: 6,
    IRISH_AND_CELTIC: 4,
    VIETNAMESE: 5,
    TURKISH: 2,
    WEST_AFRICAN: 5,
    PACIFIC: 2,
    SOUTH_ASIAN: 5,
    OTHER_SCRIPTS: 2,
}

MIDDLE_NAMES: Final = ("Ann", "Lee", "A.", "Q.", "Marie", "René", "de Jesús", "Thị", "  ")
SPACED: Final = (" {}", "{} ", "  {}  ", "{}   ", "\t{}", "{}\u00a0", "{}\n")
BLANKS: Final = ("", " ", "   ", "\t")

EMAIL_DOMAINS: Final = (
    "example.com",
    "example.net",
    "example.org",
    "mail.example.com",
    "inbox.example.net",
    "post.example.org",
    "family.example.net",
    "office.example.com",
    "students.example.org",
)
#: `{first}`, `{last}`: the handles; `{number}` makes the address unique.
EMAIL_FORMS: Final = (
    "{first}.{last}{number}",
    "{first}{last}{number}",
    "{first}_{last}{number}",
    "{first}-{last}{number}",
    "{last}.{first}.{number}",
    "{first}+taxes{number}",
    "{last}{number}",
)
NOT_EMAILS: Final = (
    "n/a",
    "N/A",
    "none",
    "",
    " ",
    "john@",
    "@example.com",
    "jane.doe",
    "jane doe@example.com",
    "jane.doe@example",
    "jane.doe@example..com",
    "jane@doe@example.com",
    "jane.doe[at]example.com",
    "jane.doe@example.com, john.doe@example.com",
    "Jane Doe <jane.doe@example.com>",
    "josé.garcía@example.com",
    "ask my wife",
    "404-555-0199",
)
#: For accounts, where addresses are unique: `{own}` is the part before the @.
NOT_ACCOUNT_EMAILS: Final = ("{own}@", "{own}", "{own} at example.com", "{own}@example", "{own}@@example.com")

AREA_CODES: Final = ("404", "678", "770", "212", "305", "312", "415", "512", "602", "713", "787", "808", "917", "951")
#: `{area}` and `{line}`; 555-0100 to 555-0199 are reserved for fiction.
PHONE_FORMS: Final = {
    "({area}) 555-{line}": 24,
    "{area}-555-{line}": 18,
    "{area}555{line}": 16,
    "+1{area}555{line}": 12,
    "+1 {area} 555 {line}": 5,
    "+1 ({area}) 555-{line}": 4,
    "1-{area}-555-{line}": 3,
    "{area}.555.{line}": 4,
    "{area} 555 {line}": 3,
    "{area}555{line} ext 7": 2,
    "({area}) 555-{line} x12": 1,
    " ({area}) 555-{line} ": 2,
    "555-{line}": 1,
    "cell: {area}-555-{line}, after 6 pm": 1,
    "({area})555-{line} / ({area})555-0100": 1,
    "+44 20 7946 {line}": 1,
    "001{area}555{line}": 1,
    "no phone": 1,
}

LEAD_SOURCES: Final = {
    "tax_intake_form": 34,
    "preparer_app_form": 9,
    "affiliate_app_form": 8,
    "contact_form": 14,
    "website": 10,
    "referral": 8,
    "short_link": 6,
    " website ": 1,
    "": 3,
}
REFERRER_TYPES: Final = {"AFFILIATE": 2, "TAX_PREPARER": 3, "CLIENT": 1}
COMMISSION_RATES: Final = {
    "5.00": 30,
    "7.50": 15,
    "10.00": 25,
    "12.50": 8,
    "15.00": 10,
    "25.00": 8,
    "50.00": 3,
    "0.00": 1,
}
#: How a referrer was found, and how sure the application is of it.
ATTRIBUTION_METHODS: Final = {
    ("cookie", "100"): 55,
    ("cookie", "95"): 10,
    ("email_match", "90"): 14,
    ("phone_match", "85"): 8,
    ("short_link", "100"): 8,
    ("manual", "70"): 3,
    ("ip_match", "40"): 2,
}

UTM_SOURCES: Final = ("newsletter", "search", "social", "flyer", "radio")
UTM_MEDIUMS: Final = ("cpc", "email", "organic", "qr")
UTM_CAMPAIGNS: Final = ("early-bird", "refund advance 2025", "bring-a-friend", "español")
USER_AGENTS: Final = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Linux; Android 14) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/125.0.0.0 Mobile Safari/537.36",
)
IP_ADDRESSES: Final = ("192.0.2.", "198.51.100.", "203.0.113.")
MESSAGES: Final = (
    "Please call me.",
    "I moved from Ohio in June.\nDo I file twice?",
    'My cousin said "ask for Ángel" 🙂',
    "W-2 + 1099-NEC, folder C:\\taxes\\2024",
    "50 % refund advance?\tYes / no",
    "¿Hablan español?",
    "   ",
    "It's about last year's amended return; I don't have the transcript.",
)
NOTES: Final = (
    "left voicemail",
    "will send documents",
    "wrong number",
    "asked to call back\nMonday",
    "spoke with spouse",
)
TAX_SITUATIONS: Final = ("W-2 only", "self-employed", "rental income", "multiple states", "first-time filer")
INCOMES: Final = ("under 25k", "25k-50k", "50k-100k", "over 100k")
CERTIFICATIONS: Final = ("EA", "CPA", "AFSP", "none yet")
EXPERIENCES: Final = ("0-1 years", "2-5 years", "10+ years")
AUDIENCES: Final = ("my church", "5,000 followers", "co-workers", "gig drivers")
CONTACT_METHODS: Final = ("phone", "email", "text", "whatsapp")
COMPANIES: Final = (
    "Peachtree Tax LLC",
    "Núñez & Sons",
    " Quick Refund Co. ",
    "O'Brien Bookkeeping",
    "Lê Accounting",
    "",
    "A+ Taxes",
    "Müller Steuerbüro",
)
BIOS: Final = ("Enrolled agent since 2009.", "Se habla español.", "Ich helfe gern.", "10 years\n3,000 returns")
CITIES: Final = ("Sampleville", "Exampleton", "Testburg", "Muestra")

INTERACTION_TYPES: Final = {"EMAIL": 45, "PHONE_CALL": 30, "NOTE": 15, "MEETING": 7, "OTHER": 3}
SUBJECTS: Final = (
    "Your tax return",
    "Documents we still need",
    "Re: appointment",
    "Bienvenida, ¿cómo podemos ayudar?",
    "",
)
