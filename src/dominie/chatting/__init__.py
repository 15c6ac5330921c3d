"""`dominie chat`: one or several models of runs, talked to side by side."""

from dominie.chatting.partners import Partner, partners
from dominie.chatting.session import Settings, chat

__all__ = ["Partner", "Settings", "chat", "partners"]
