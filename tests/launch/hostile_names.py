"""Names that would do harm if any program on the way took them for more than a name."""

from __future__ import annotations

CANARY = "executed"
"""The file that each of them makes in the working directory if it is executed."""

_TOUCH = f"touch {CANARY}"
_FORMS = (
    "$({0})", "`{0}`", ";{0};", "|{0}", "&{0}&", "&&{0}", "||{0}", "x;{0}#", "x\n{0}\n", "x\r\n{0}\n", "'$({0})'",
    '"$({0})"', "';{0};'", '";{0};"', "a'$({0})", 'a"$({0})"', "\\$({0})", "$(({0}))", "${{x:-$({0})}}", "<({0})",
    ">({0})", "x>executed", "x >executed <", ">executed", ">>executed", "--wrap={0}", "--wrap {0}", "-{0}", "- {0}",
    "--export=ALL,x=$({0})", "--output=executed", "--job-name=$({0})", "--dependency=after:1;{0}", "\t{0}", " {0} ",
    "\x00{0}", "\x1b[2J{0}", "\x07$({0})", "\x7f{0}", "%j$({0})", "%x;{0}", "%%", "\\n{0}", "#!/bin/sh\n{0}", "!{0}",
    "{{{0},x}}", "$IFS{0}", "${{IFS}};{0}", "a b;{0}", "*;{0}", "?;{0}", "[a-z];{0}", "~;{0}", "$HOME;{0}",
    "x$PATH`{0}`", "x\n#SBATCH --wrap='{0}'", "\n#SBATCH --output=executed\n", "=;{0}", "x=$({0})", "\u2028{0}",
    "\u202e$({0})", "\ud800{0}", "e\u0301$({0})", "\xa0;{0}", "\uff04({0})", "\u037e{0}", "../$({0})", "./;{0}",
    "//$({0})//", ".;{0}", "..", ".", "-", "--", "---", "-n1", "--help", "--version", "-p", "@;{0}", "^{0}^",
    "x:$({0})", "x,$({0})", "x;y,z;{0}", "node[1-2];{0}", "node[1-$({0})]", "node[$({0})]", "a@b;{0}", "a+b`{0}`",
    "%N;{0}", "%t$({0})", "$0;{0}", "$@;{0}", "$!;{0}", "$$;{0}", "$?`{0}`", "$'\\n{0}'", '$"{0}"', "<<X\n{0}\nX",
    "&>executed", "2>executed", "x\x0b{0}", "x\x0c{0}", "a\\", "'", '"', "`", "(", "{{", "x" * 300 + ";{0}",
)  # fmt: skip
HOSTILE = tuple(dict.fromkeys(form.format(_TOUCH) for form in _FORMS))
