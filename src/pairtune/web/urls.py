"""URL routes."""

from __future__ import annotations

from django.urls import path

from pairtune.web import chat, exports, icons, new_run, pair_browser, run_pages

urlpatterns = [
    path("", chat.chat, name="chat"),
    path("icons.svg", icons.icons, name="icons"),
    path("chat/<int:pk>/", chat.chat, name="conversation"),
    path("chat/say", chat.say, name="say-first"),
    path("chat/models", chat.setup, name="models"),
    path("chat/presets", chat.save_preset, name="save-preset"),
    path("chat/search", chat.search, name="search"),
    path("chat/<int:pk>/say", chat.say, name="say"),
    path("chat/<int:pk>/delete", chat.delete, name="delete"),
    path("chat/<int:pk>/rename", chat.rename, name="rename"),
    path("chat/<int:pk>/pin", chat.pin, name="pin"),
    path("chat/<int:pk>/export", chat.export, name="export-conversation"),
    path("answers/<int:pk>/stop", chat.stop, name="stop"),
    path("answers/<int:pk>/again", chat.again, name="again"),
    path("answers/<int:pk>/go-on", chat.go_on, name="go-on"),
    path("answers/<int:pk>/choose", chat.choose, name="choose"),
    path("answers/<int:pk>/vote", chat.vote, name="vote"),
    path("turns/<int:pk>/branch", chat.branch, name="branch"),
    path("turns/<int:pk>/events", chat.events, name="events"),
    path("runs/", run_pages.runs, name="runs"),
    path("runs/new", new_run.choose_data, name="new-run"),
    path("runs/new/<int:pk>/", new_run.draft, name="draft"),
    path("runs/new/<int:pk>/check", new_run.check, name="check-draft"),
    path("runs/new/<int:pk>/cost", new_run.cost, name="draft-cost"),
    path("runs/compare", run_pages.compare, name="compare-runs"),
    path("runs/<str:name>/", run_pages.run, name="run"),
    path("runs/<str:name>/live", run_pages.live, name="live"),
    path("runs/<str:name>/note", run_pages.note, name="note"),
    path("runs/<str:name>/stop", run_pages.stop, name="stop-run"),
    path("runs/<str:name>/resume", run_pages.resume, name="resume-run"),
    path("runs/<str:name>/clone", new_run.clone, name="clone-run"),
    path("runs/<str:name>/report", run_pages.report, name="report"),
    path("runs/<str:name>/dismiss", run_pages.dismiss, name="dismiss"),
    path("runs/<str:name>/pairs", pair_browser.pairs, name="pairs"),
    path("runs/<str:name>/pairs/mark", pair_browser.mark, name="mark-pair"),
    path("runs/<str:name>/export", exports.export, name="export"),
    path("runs/<str:name>/push", exports.push, name="push"),
    path("runs/<str:name>/download/<str:what>", exports.download, name="download"),
    path("jobs/<int:pk>/", exports.job, name="job"),
    path("jobs/<int:pk>/stop", exports.stop, name="stop-job"),
    path("jobs/<int:pk>/download", exports.download_export, name="download-export"),
]
