"""URL routes."""

from __future__ import annotations

from django.urls import path

from pairtune.web import chat, pair_browser, run_pages

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
    path("runs/", run_pages.runs, name="runs"),
    path("runs/new", run_pages.new, name="new-run"),
    path("runs/<str:name>/", run_pages.run, name="run"),
    path("runs/<str:name>/report", run_pages.report, name="report"),
    path("runs/<str:name>/dismiss", run_pages.dismiss, name="dismiss"),
    path("runs/<str:name>/pairs", pair_browser.pairs, name="pairs"),
    path("runs/<str:name>/download/<str:what>", run_pages.download, name="download"),
]
