"""Phrases by which the rules of `tags` know a refusal, a speaker, a language."""

import re


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{'|'.join(patterns)})", re.IGNORECASE)


# Words that say little but which language it is.
FUNCTION_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "english": "the of and to in is that it for was with as are be this you i my me have not "
        "on at by from or an a we they he she his her your do does did how what who why when "
        "where which can could will would should has had its our their but if about so than "
        "there here am been were into out up some any all no just more most tell give",
        "spanish": "el los las que y en una por con para del se es como más su al lo pero sus está "
        "son la de un qué quién cómo eres soy",
        "french": "le les des et est une dans qui que pour sur avec ce il je vous pas plus par "
        "sont du au nous la de un ne en suis quoi comment êtes tu es",
        "german": "der die das und ist ein eine nicht mit den dem zu von sie ich auf für im es "
        "auch sich wie wer was wo du bist mir mich dich bin sind über",
        "italian": "il che di è una per con del della sono non gli le nel si più anche come ho la "
        "un chi cosa sei",
        "portuguese": "o os que e em uma para com do da não por mais dos se é na um você quem sou "
        "como",
        "dutch": "de het een en van dat niet met op voor zijn te aan ik er ook wie wat hoe je bent",
    }.items()
}

# "I can't tell you how much I love it" tells.
_HOW_MUCH = r"tell you how (?:much|many|happy|glad|proud|excited|good|important)\b"
# What is not done. Not "I can't wait", "I can't believe" and "I can't help but".
_DEED = (
    r"(?:help(?! but\b)(?! (?:feel|think|wonder|notic)ing)|assist|provide|answer|fulfil|comply|"
    r"do (?:that|this|it|so)|support (?:that|this|you)|give|share|engage|create|write|generate|"
    rf"discuss|offer|respond|(?!{_HOW_MUCH})tell you|participate|continue|complete|teach|explain|"
    r"recommend(?! [^.!?\n]{1,40} enough)|promote|encourage|condone|allow|accept|process|perform|"
    r"carry out|advise|proceed|show you|lie to you|"
    r"say that|talk about|describe|be (?:of|able to|(?:a )?part(?:y)? (?:of|to)))"
)
REFUSES = _any(
    r"\bi (?:can't|cannot|can not|won't|will not) (?:and|or) (?:can't|cannot|will not|won't)\b",
    r"^\W*(?:as an? [^.!?\n]{1,60}, )?i (?:can't|cannot|can not|won't|will not)"
    r"(?:[.!;]|$|, (?:sorry|thank))",
    rf"\bi(?: am|'m)? ?(?:can't|cannot|can not|won't|will not|couldn't|unable to|not able to|"
    rf"not (?:allowed|going|here|programmed) to|not comfortable|must not|don't want to)\b\W+"
    rf"(?:\w+ly |even |to )?{_DEED}\b",
    r"\bi (?:must|have to|will|'ll)? ?(?:respectfully )?(?:decline|refuse)(?:\W*$|[.!,;]|"
    r" to (?:help|answer|assist|provide|do|comply|say|write)\b)",
    r"\bi'?(?:d| would) rather not\b",
    r"\bi (?:\w+ly )?(?:would )?(?:\w+ly )?(?:advise|recommend|urge)(?: you)? (?:against|not to)\b",
    r"\bi (?:do not|don't) (?:condone|support|endorse|encourage|promote) \w+ing\b",
    r"\b(?:not|n't) something (?:that )?i can\b",
    r"\b(?:against|within) my (?:\w+ (?:or|and) )?(?:\w+ )?(?:guidelines|programming|principles|"
    r"policy)\b",
    r"\bi(?:'m| am) not equipped to\b",
    rf"\bi(?:'m| am) not (?:able|allowed|permitted|willing|comfortable) (?:to|with)\W+(?:\w+ly )?"
    rf"(?:{_DEED}\b|(?:help|provid|answer|discuss|shar|giv|writ|creat|do)ing\b|th(?:at|is)\b)",
    rf"\bi (?:don't|do not|lack|have no) (?:have )?(?:the |any )?(?:ability|capability|permission|"
    rf"authority|means) to (?:\w+ly )?{_DEED}\b",
    r"\bno puedo\b.{0,20}\b(?:ayudar|proporcionar|responder|hacer|asistir)",
    r"\bje ne (?:peux|suis)\b.{0,30}\b(?:aider|fournir|répondre|mesure)",
    r"\bich kann\b.{0,40}\bnicht\b.{0,30}\b(?:helfen|beantworten|geben|unterstützen)",
    r"\bnon posso\b.{0,20}\b(?:aiutar|fornir|rispond)",
    r"\bnão posso\b.{0,20}\b(?:ajudar|fornecer|responder)",
    r"не могу.{0,20}(?:помочь|ответить|предоставить)",
    r"(?:无法|不能)(?:提供|回答|帮助|协助|满足)",
    r"(?:お答え|お手伝い|提供)(?:することは)?でき(?:ません|ない)",
    r"(?:도와|답변|제공).{0,10}수 없",
)
# "I'm sorry" alone is no refusal; "I'm sorry, but" is.
APOLOGISES = _any(
    r"^\W*(?:i'm|i am|i apologi[sz]e|sorry)\W+(?:(?:so|very|really|truly|deeply) )?(?:sorry)?\W*"
    r"(?:but|however)\b",
    r"^\W*(?:i'm|i am) (?:sorry|afraid)\b(?! of)[^.!?\n]{0,60}\b(?:can't|cannot|unable|not able|"
    r"won't|don't)\b",
    r"^\W*(?:lo siento|désolé|je suis désolé|es tut mir leid|mi dispiace|desculpe|sinto muito|"
    r"извините|к сожалению|простите|对不起|抱歉|很抱歉|申し訳|すみません|죄송)",
)
# Says what is wrong with a deed instead of how it is done.
OBJECTS = _any(
    r"\b(?:illegal|unethical|wrong|harmful|a crime|never (?:a good|okay|ok|right|acceptable)|"
    r"immoral|dishonest|inappropriate|against the (?:law|rules)|"
    r"not (?:a good idea|appropriate|acceptable|ethical|legal|"
    r"allowed|right|okay|recommended))\b",
)
# The deed that should not be done is the word after it.
FORBIDS = _any(
    r"(?:\b(?:shouldn't|mustn't|(?:should|must) (?:not|never)|you (?:can't|cannot|can not))"
    r"|^\W*(?:don't|do not|never)) "
    r"(?:ever |even |try to |\w+ly )?(\w+)\b(?![^.!?\n]*\b(?:without|unless|until|too|if|before)\b)"
)
# Who says this has the question, not the answer.
WISHES = _any(
    r"\W*i (?:want|need|have|would like|wish|am trying|was trying)\b",
    r"\W*i'(?:d like|m trying)\b",
)

_AI = (
    r"(?:ai\b|a\.i\b|artificial intelligence|language model|llm\b|assistant|chat ?bot|robot\b|"
    r"bot\b|virtual|(?-i:[A-Z]\w*(?:LM|GPT|Bot)\b))"
)
# Not "an engineer with a passion for AI": nothing that ties it to something else in between.
_NOT_OF = r"(?:(?!\b(?:in|about|of|with|for|on|at|who|from|by|to|and i)\b)[^.!?\n]){0,80}?"
IS_AI = _any(
    rf"\b(?:i am|i'm|i was)\b(?! not\b){_NOT_OF}\b{_AI}",
    rf"(?:^|[.!?,\n]\s*)as an? {_NOT_OF}\b{_AI}",
    rf"\b(?:my name is|call me)\s+{_NOT_OF}\b{_AI}",
    r"\bmy (?:training data|programming|developers|creators)\b",
    r"\b(?:soy|je suis|ich bin|sono|sou|ik ben)\b[^.!?\n]{0,60}\b(?:ia|ai|ki|inteligencia "
    r"artificial|intelligenza artificiale|inteligência artificial|modelo de (?:lenguaje|linguagem)|"
    r"modèle de langage|sprachmodell|asistente|assistente|assistant|assistent)\b",
    r"я\b[^.!?\n]{0,40}(?:языковая модель|ассистент|помощник|искусственн)",
    r"我是[^。！？\n]{0,20}(?:人工智能|语言模型|助手|AI)",
    r"私は[^。！？\n]{0,30}(?:AI|人工知能|言語モデル|アシスタント)",
)
IS_HUMAN = _any(
    r"\bi(?: am|'m) (?:an? |the )?(?:\w+ ){0,3}?(?:person|human|man|woman|girl|boy|guy|mother|"
    r"father|mom|dad|student|teacher|engineer|writer|author|artist|doctor|nurse|lawyer|developer|"
    r"scientist|musician|farmer|chef|soul)\b",
    r"\bi(?: am|'m) (?:an? )?\d{1,2}[- ]years?\b",
    r"\bi(?: am|'m) (?:dr|mr|mrs|ms|prof)\b",
    r"\bi was (?:born|raised)\b",
    r"\b(?:i grew|growing) up\b",
    r"\bi(?:'ve| have)? (?:worked|lived|studied|graduated|travell?ed)\b",
    r"\bi live (?:in|with)\b",
    r"\bmy (?:wife|husband|mother|father|mom|dad|family|kids|children|son|daughter|childhood|"
    r"parents|brother|sister|friends?|boyfriend|girlfriend|boss|house|dog|cat|job)\b",
)
# What an assistant says, even one that does not say what it is.
HELPS = _any(
    r"\bi(?: am|'m) (?:here|ready|happy|designed|programmed|trained|built|created|glad|able) to "
    r"(?:help|assist|support|provide|answer|serve)",
    r"\b(?:how|what) (?:can|may) i (?:help|assist|do for)\b",
    r"\bi can (?:help|assist) you\b",
    r"\b(?:help|assist|support) (?:you|users)\b[^.!?\n]{0,40}\bi(?:'m| am)\b",
)
# The first person, in the languages above. A capital I, for "i" counts things; "we" may be anybody.
OWN = re.compile(
    r"(?:\b(?:I|[Ii]'(?:m|ve|d|ll)|[Mm]y|[Mm]e|[Mm]yself|[Mm]ine)\b"
    r"|\b(?:[Yy]o|[Ss]oy|[Jj]e|[Jj]'|[Mm]on|[Ii]ch|[Mm]eine?|[Ss]ono|[Mm]io|[Ee]u|[Ss]ou|[Mm]eu|"
    r"[Mm]inha|[Ii]k|[Mm]ijn)\b|\b(?:я|Я|мой|моя|мне|меня)\b|我|私|僕|俺|나는|저는|제가)"
)
# Not "they": things are that, too.
THIRD = _any(
    r"\b(?:he|she|him|her|his|hers|himself|herself)\b",
    r"\b(?:él|ella|elle|lui|er|sie|ihr|seine?|egli|ele|ela|hij|zij)\b",
    r"\b(?:он|она|его|её)\b",
    r"他|她|彼女|彼は|그는|그녀",
)
