"""Which page stands where."""

from __future__ import annotations

from django.urls import path

from pairtune.web import chat, pairs, runs

urlpatterns = [
    path("", chat.chat, name="chat"),
    path("chat/<int:pk>/", chat.chat, name="conversation"),
    path("chat/say", chat.say, name="say-first"),
    path("chat/<int:pk>/say", chat.say, name="say"),
    path("chat/<int:pk>/delete", chat.delete, name="delete"),
    path("chat/search", chat.search, name="search"),
    path("answers/<int:pk>/events", chat.events, name="events"),
    path("answers/<int:pk>/stop", chat.stop, name="stop"),
    path("answers/<int:pk>/again", chat.again, name="again"),
    path("answers/<int:pk>/choose", chat.choose, name="choose"),
    path("turns/<int:pk>/branch", chat.branch, name="branch"),
    path("runs/", runs.runs, name="runs"),
    path("runs/new", runs.new, name="new-run"),
    path("runs/<str:name>/", runs.run, name="run"),
    path("runs/<str:name>/report", runs.report, name="report"),
    path("runs/<str:name>/dismiss", runs.dismiss, name="dismiss"),
    path("runs/<str:name>/pairs", pairs.pairs, name="pairs"),
    path("runs/<str:name>/download/<str:what>", runs.download, name="download"),
]
