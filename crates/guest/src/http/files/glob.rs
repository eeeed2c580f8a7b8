//! Globs as ignore files have them: `*` and `?` stay inside a name, `**` crosses directories,
//! `[a-z]` and `[!a-z]` are classes, `\` takes the next character as it is.
//!
//! `.gitignore`: comments, blank lines, `!` (the last match decides), a trailing `/` for
//! directories only, a pattern with a slash is anchored at its file's directory, one without
//! matches at any depth. Must never take more time than pattern length × name length.

use crate::limits::{PATTERN_MAX_BYTES, PATTERNS_MAX};

/// One pattern.
#[derive(Debug, Clone)]
struct Pattern {
    text: Vec<u8>,
    /// Matched against the path from the base; else against the name.
    anchored: bool,
    directories_only: bool,
    negated: bool,
}

/// Patterns; the last that matches decides.
#[derive(Debug, Clone, Default)]
pub(super) struct Patterns(Vec<Pattern>);

impl Patterns {
    /// Patterns of a request: each ignores.
    pub(super) fn of_words<'a>(words: impl Iterator<Item = &'a str>) -> Self {
        Self(
            words
                .take(PATTERNS_MAX)
                .filter_map(Pattern::parse)
                .collect(),
        )
    }

    /// The patterns of a `.gitignore`.
    pub(super) fn of_gitignore(text: &str) -> Self {
        let lines = text.lines().take(PATTERNS_MAX);
        let lines = lines.filter(|line| !line.starts_with('#'));
        let parse = |line: &str| {
            let line = line.trim_end();
            let (negated, line) = match line.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, line),
            };
            Some(Pattern {
                negated,
                ..Pattern::parse(line)?
            })
        };
        Self(lines.filter_map(parse).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `Some(true)`: ignore; `Some(false)`: keep; `None`: no pattern speaks of it. `path` is
    /// relative to the patterns' directory.
    pub(super) fn verdict(&self, path: &[u8], directory: bool) -> Option<bool> {
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
        let last = self.0.iter().rev().find(|pattern| {
            let subject = if pattern.anchored { path } else { name };
            (directory || !pattern.directories_only) && matches(&pattern.text, subject)
        });
        last.map(|pattern| !pattern.negated)
    }
}

impl Pattern {
    fn parse(text: &str) -> Option<Self> {
        let (directories_only, text) = match text.strip_suffix('/') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let anchored = text.contains('/');
        let text = text.strip_prefix('/').unwrap_or(text);
        (!text.is_empty() && text.len() <= PATTERN_MAX_BYTES).then(|| Self {
            text: text.as_bytes().to_vec(),
            anchored,
            directories_only,
            negated: false,
        })
    }
}

/// Whether `pattern` matches the whole of `text`. Runs all ways through the pattern side by side,
/// so that no pattern takes exponential time.
pub(super) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let tokens = tokens(pattern);
    // at[i]: the first i tokens can match what was read so far.
    let mut at = vec![false; tokens.len() + 1];
    at[0] = true;
    skip_empty(&tokens, &mut at, true);
    for (n, byte) in text.iter().enumerate() {
        let mut next = vec![false; tokens.len() + 1];
        for (i, token) in tokens.iter().enumerate().filter(|(i, _)| at[*i]) {
            match token {
                Token::Star if *byte != b'/' => next[i] = true,
                Token::DoubleStar => next[i] = true,
                Token::DoubleStarSlash => {
                    next[i] = true;
                    next[i + 1] |= *byte == b'/';
                }
                Token::Any if *byte != b'/' => next[i + 1] = true,
                Token::Byte(want) if byte == want => next[i + 1] = true,
                Token::Class { negated, ranges } if *byte != b'/' => {
                    let inside = ranges
                        .iter()
                        .any(|(low, high)| (low..=high).contains(&byte));
                    next[i + 1] |= inside != *negated;
                }
                _ => {}
            }
        }
        skip_empty(&tokens, &mut next, text[n] == b'/');
        at = next;
    }
    at[tokens.len()]
}

enum Token {
    /// `*`
    Star,
    /// `**` at the end, or inside a name.
    DoubleStar,
    /// `**/`: any directories, or none.
    DoubleStarSlash,
    Any,
    Byte(u8),
    Class {
        negated: bool,
        ranges: Vec<(u8, u8)>,
    },
}

/// Steps over tokens that match nothing; `**/` only where a name begins.
fn skip_empty(tokens: &[Token], at: &mut [bool], name_begins: bool) {
    for (i, token) in tokens.iter().enumerate() {
        let empty = match token {
            Token::Star | Token::DoubleStar => true,
            Token::DoubleStarSlash => name_begins,
            _ => false,
        };
        at[i + 1] |= at[i] && empty;
    }
}

fn tokens(pattern: &[u8]) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = pattern;
    while let Some((first, tail)) = rest.split_first() {
        let token;
        (token, rest) = match (first, tail) {
            (b'*', [b'*', b'/', tail @ ..]) => (Token::DoubleStarSlash, tail),
            (b'*', [b'*', tail @ ..]) => (Token::DoubleStar, tail),
            (b'*', _) => (Token::Star, tail),
            (b'?', _) => (Token::Any, tail),
            (b'\\', [byte, tail @ ..]) => (Token::Byte(*byte), tail),
            (b'[', _) => class(tail).unwrap_or((Token::Byte(b'['), tail)),
            (byte, _) => (Token::Byte(*byte), tail),
        };
        tokens.push(token);
    }
    tokens
}

/// The class whose `[` was read, and what follows it; nothing if it has no `]`.
fn class(rest: &[u8]) -> Option<(Token, &[u8])> {
    let (negated, rest) = match rest {
        [b'!' | b'^', tail @ ..] => (true, tail),
        _ => (false, rest),
    };
    // A `]` that stands first is a member.
    let end = 1 + rest.get(1..)?.iter().position(|byte| *byte == b']')?;
    let (mut members, tail) = (&rest[..end], &rest[end + 1..]);
    let mut ranges = Vec::new();
    loop {
        (members, ()) = match members {
            [low, b'-', high, more @ ..] => (more, ranges.push((*low, *high))),
            [one, more @ ..] => (more, ranges.push((*one, *one))),
            [] => return Some((Token::Class { negated, ranges }, tail)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn globs() {
        for (pattern, text, want) in [
            ("*.rs", "a.rs", true),
            ("*.rs", "d/a.rs", false),
            ("**/a", "a", true),
            ("**/a", "x/y/a", true),
            ("**/a", "xa", false),
            ("a/**", "a/b/c", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**/b", "a/xb", false),
            ("?", "é", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]", "]", true),
            ("[", "[", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                want,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn gitignore() {
        let patterns = Patterns::of_gitignore("# no\n\ntarget/\n/top\n*.log\n!keep.log\na/b\n");
        for (path, directory, want) in [
            ("target", true, Some(true)),
            ("x/target", true, Some(true)),
            ("target", false, None),
            ("top", false, Some(true)),
            ("x/top", false, None),
            ("x/y.log", false, Some(true)),
            ("x/keep.log", false, Some(false)),
            ("a/b", false, Some(true)),
            ("x/a/b", false, None),
        ] {
            assert_eq!(patterns.verdict(path.as_bytes(), directory), want, "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_text_matches_itself_escaped(text in "[ -~]{0,20}") {
            let escaped: Vec<u8> = text.bytes().flat_map(|b| [b'\\', b]).collect();
            prop_assert!(matches(&escaped, text.as_bytes()));
        }

        #[test]
        fn agrees_with_the_obvious_matcher(pattern in "[ab*?/]{0,8}", text in "[ab/]{0,8}") {
            prop_assume!(!pattern.contains("**"));
            fn slow(p: &[u8], t: &[u8]) -> bool {
                match (p, t) {
                    ([], []) => true,
                    ([b'*', p @ ..], _) if slow(p, t) => true,
                    ([b'*', ..], [b, t @ ..]) => *b != b'/' && slow(p, t),
                    ([b'?', p @ ..], [b, t @ ..]) => *b != b'/' && slow(p, t),
                    ([a, p @ ..], [b, t @ ..]) => a == b && slow(p, t),
                    _ => false,
                }
            }
            prop_assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                slow(pattern.as_bytes(), text.as_bytes())
            );
        }

        #[test]
        fn never_panics(pattern in "[a\\[\\]!*?\\\\/-]{0,30}", text in "[a/\\]-]{0,30}") {
            matches(pattern.as_bytes(), text.as_bytes());
        }
    }
}
