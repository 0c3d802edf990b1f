"""The forms of a conversation: a message, who answers it, and how."""

from __future__ import annotations

from typing import Any

from django import forms
from django.http import HttpResponse, HttpResponseBadRequest

MOST_MODELS = 4
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512, "seed": None}
_LONGEST = 1_200_000  # characters of a prompt: beyond any model's context, below the request limit
_LONGEST_SYSTEM = 20_000


class ModelNames(forms.Field):
    """The names of one to four models, each once."""

    widget = forms.SelectMultiple

    def clean(self, value: Any) -> list[str]:
        """The names that were given, in their order."""
        names = list(dict.fromkeys(filter(None, value or [])))
        if not names:
            raise forms.ValidationError("There is no model to answer yet. What you wrote stays here.")
        if len(names) > MOST_MODELS or max(map(len, names)) > 300:
            raise forms.ValidationError(f"Choose at most {MOST_MODELS} models.")
        return names


class _Form(forms.Form):
    """A form whose errors are told in words."""

    def refusal(self) -> HttpResponse:
        """The first error of every field, a line each, in words."""
        lines = []
        for name, errors in self.errors.items():
            label = "" if name in ("prompt", "model", "__all__") else f"{self.fields[name].label or name}: "
            lines.append(f"{label}{errors[0]}")
        return HttpResponseBadRequest("\n".join(lines), content_type="text/plain; charset=utf-8")


class Question(_Form):
    """A message."""

    prompt = forms.CharField(max_length=_LONGEST, strip=False, error_messages={"required": "Write something first."})

    def clean_prompt(self) -> str:
        """Refuse an empty prompt."""
        prompt: str = self.cleaned_data["prompt"].replace("\r\n", "\n")
        if not prompt.strip():
            raise forms.ValidationError("Write something first.")
        return prompt


class Setup(_Form):
    """The system message and the sampling parameters."""

    system = forms.CharField(max_length=_LONGEST_SYSTEM, required=False, strip=False)
    temperature = forms.FloatField(min_value=0, max_value=2, label="Temperature")
    top_p = forms.FloatField(min_value=0.01, max_value=1, label="Top-p")
    max_tokens = forms.IntegerField(min_value=1, max_value=8192, label="Most tokens")
    seed = forms.IntegerField(min_value=0, max_value=2**31 - 1, required=False, label="Seed")

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters."""
        return {name: self.cleaned_data[name] for name in SAMPLING}

    def clean_system(self) -> str:
        """The system message; white space alone is none."""
        text: str = self.cleaned_data["system"].replace("\r\n", "\n")
        return text if text.strip() else ""


class Asked(Question, Setup):
    """The form below a conversation."""

    model = ModelNames()
