"""Names by which logs of many kinds call their columns, for [`column_inference`]."""

from __future__ import annotations

import re

# Names of ids, the likeliest first, without what parts their words.
USER_NAMES = (
    *("userid", "uid", "user", "username", "reviewerid", "customerid", "customer", "visitorid", "visitor", "memberid"),
    *("member", "accountid", "account", "clientid", "profileid", "personid", "subscriberid", "buyerid", "shopperid"),
    *("playerid", "listenerid", "readerid", "studentid", "learnerid", "householdid", "householdkey", "msno"),
    *("fullvisitorid", "deviceid", "cookieid", "reviewer", "usersha1", "who", "userpseudoid"),
)
ITEM_NAMES = (
    *(
        "itemid",
        "item",
        "iid",
        "parentasin",
        "videoid",
        "photoid",
        "movieid",
        "trackid",
        "traid",
        "songid",
        "productid",
    ),
    *(
        "newsid",
        "articleid",
        "businessid",
        "gmapid",
        "bookid",
        "asin",
        "isbn",
        "sku",
        "stockcode",
        "productcode",
        "aid",
    ),
    *("video", "movie", "track", "song", "product", "article", "news", "business", "book", "game", "gameid", "appid"),
    *("artistid", "artid", "artist", "albumid", "animeid", "beerid", "recipeid", "courseid", "contentid", "goodsid"),
    *("postid", "noteid", "clipid", "venueid", "locationid", "poiid", "hotelid", "listingid", "showid", "episodeid"),
    *("podcastid", "adid", "creativeid", "offerid", "eventid", "jobid", "what", "title", "trackname", "traname"),
    *("artistname", "artname"),
)
SESSION_NAMES = (
    *("sessionid", "session", "usersession", "requestid", "request", "impressionid", "visitid", "queryid", "listid"),
    *("basketid", "orderid", "invoiceno", "invoice", "transactionid"),
)
TIME_NAMES = (
    *("timestamp", "timems", "unixtime", "unixreviewtime", "eventtime", "eventtimestamp", "time", "ts", "datetime"),
    *("createdat", "created", "ratedat", "clicktime", "viewtime", "servertime", "listenedat", "playedat", "watchedat"),
    *(
        "reviewtime",
        "invoicedate",
        "orderdate",
        "purchasedate",
        "eventdate",
        "reviewdate",
        "date",
        "day",
        "at",
        "when",
    ),
)
POSITION_NAMES = ("position", "seq", "sequence", "order", "step", "rank", "turn", "addtocartorder")
EVENT_NAMES = (
    *("event", "eventtype", "eventname", "type", "action", "actiontype", "behavior", "behaviortype", "behaviour"),
    *("behaviourtype", "interaction", "interactiontype", "activity", "activitytype", "verb", "feedback", "signal"),
)
# Words of feedback. Of two kinds of explicit feedback the signs of dislike are looked for first.
NEGATIVE_WORDS = {
    *("dislike", "disliked", "hate", "hated", "skip", "skipped", "block", "blocked", "report", "remove", "removed"),
    *("unlike", "unfollow", "hide", "hidden", "impression", "exposure", "expose", "shown", "show", "dismiss"),
    *("dismissed", "delete", "deleted", "bounce", "unsubscribe", "refund", "return", "returned", "down"),
}
POSITIVE_WORDS = {
    "like": {"like", "liked", "likes", "heart", "hearted", "favorite", "favourite", "fav", "love", "loved", "up"},
    "follow": {"follow", "followed", "subscribe", "subscribed"},
    "view": {"view", "viewed"},
    "click": {"click", "clicked", "clk"},
    "share": {"share", "shared", "forward", "forwarded", "repost"},
    "comment": {"comment", "commented", "reply"},
    "cart": {"cart", "basket", "addtocart"},
    "purchase": {"purchase", "purchased", "buy", "bought", "order", "ordered", "transaction", "conversion", "paid"},
    "save": {"save", "saved", "bookmark", "bookmarked", "collect", "wishlist", "download", "downloaded"},
    "finish": {"finish", "finished", "complete", "completed"},
}
RATING_WORDS = {"rating", "ratings", "rate", "stars", "star", "score", "overall", "grade"}
PLAY_WORDS = {
    *("watch", "watched", "watching", "play", "played", "listen", "listened", "dwell", "view", "viewing", "seen"),
    *("read", "reading", "spent", "stay", "consumed"),
}
SPAN_WORDS = {"time", "duration", "length", "runtime", "ms", "msec", "millis", "milliseconds", "s", "sec", "secs"}
SPAN_WORDS |= {"second", "seconds", "minutes", "mins", "min"}
LENGTH_WORDS = {"duration", "length", "runtime"}
RATIO_WORDS = {"ratio", "percent", "pct", "percentage", "progress", "completion"}
SECONDS_BY_WORD = {
    **dict.fromkeys(("ms", "msec", "millis", "milliseconds"), 0.001),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("minutes", "mins", "min"), 60),
}
# Of items: what is a name, what is no feature, and totals of all times, which would tell of the evaluated period.
TITLE_WORDS = ("title", "name", "headline", "caption", "description", "text")
UNUSED_WORDS = {"url", "urls", "link", "image", "images", "thumbnail", "path", "hash", "index", "unnamed"}
TOTAL_WORDS = {"average", "avg", "mean", "count", "counts", "cnt", "num", "number", "votes", "popularity", "review"}
TOTAL_WORDS |= {"reviews", "rating", "ratings", "stars", "rank"}


def words(name: str) -> list[str]:
    """Lower-case words of a column's name, which case, digits and signs part."""
    parted = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", str(name))
    return re.findall(r"[^\W_]+", parted.lower())


def joined_words(name: str) -> str:
    """The name without what parts its words."""
    return "".join(words(name))
