//! Hostile gateway tokens: none of them may pass.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use seal::hash::hmac_sha256;
use seal::jwt::{JwtError, peek_aud, sign, verify};
use seal::sign::{SigningKey, VerifyingKey};
use serde::Deserialize;
use serde_json::{Value, json};

const NOW_S: i64 = 1_800_000_000;
const AUD: &str = "ws_0123456789abcdef";

#[derive(Debug, Deserialize, PartialEq)]
struct Claims {
    aud: String,
    jti: String,
    exp: i64,
}

fn key() -> SigningKey {
    SigningKey::from_seed(&[42; 32])
}

fn b64(bytes: impl AsRef<[u8]>) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.as_ref().chunks(3) {
        let word = chunk
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            out.push(DIGITS[(word >> (18 - 6 * digit)) as usize & 63] as char);
        }
    }
    out
}

fn header() -> String {
    format!(
        r#"{{"alg":"EdDSA","typ":"JWT","kid":"{}"}}"#,
        key().public().key_id()
    )
}

fn claims() -> Value {
    json!({"aud": AUD, "jti": "t1", "iat": NOW_S, "exp": NOW_S + 600})
}

/// Truly signs whatever it is given.
fn signed(header: impl AsRef<[u8]>, claims: impl AsRef<[u8]>) -> String {
    let text = format!("{}.{}", b64(header), b64(claims));
    let signature = key().sign_raw(text.as_bytes());
    format!("{text}.{}", b64(signature))
}

fn with_header(header: &str) -> String {
    signed(
        header.replace("KID", &key().public().key_id()),
        claims().to_string(),
    )
}

fn with_claims(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> String {
    let mut claims = claims();
    change(claims.as_object_mut().unwrap());
    signed(header(), claims.to_string())
}

fn set(name: &str, value: Value) -> String {
    with_claims(|claims| {
        claims.insert(name.to_owned(), value);
    })
}

fn without(name: &str) -> String {
    with_claims(|claims| {
        claims.remove(name);
    })
}

fn check(token: &str) -> Result<Claims, JwtError> {
    verify(token, &[key().public()], AUD, NOW_S)
}

#[test]
fn a_good_token_passes() {
    let token = sign(&key(), &claims());
    let other = SigningKey::generate().public();
    let read: Claims = verify(&token, &[other, key().public()], AUD, NOW_S).unwrap();
    assert_eq!(
        read,
        Claims {
            aud: AUD.into(),
            jti: "t1".into(),
            exp: NOW_S + 600
        }
    );
    assert_eq!(peek_aud(&token).as_deref(), Some(AUD));
    // The tests' own encoder makes the same text.
    assert_eq!(token, signed(header(), claims().to_string()));
    // Unknown claims are the issuer's business; iat and nbf may be absent.
    check(&set("epoch", json!(7))).unwrap();
    check(&without("iat")).unwrap();
    check(&set("exp", json!(NOW_S + 3600))).unwrap();
    check(&set("nbf", json!(NOW_S + 30))).unwrap();
    check(&set("iat", json!(NOW_S + 30))).unwrap();
}

#[test]
fn expired_is_told_apart_from_invalid() {
    let at = |exp_s: i64| set("exp", json!(exp_s));
    let with_iat = |exp_s: i64| {
        with_claims(|claims| {
            claims.insert("iat".into(), json!(exp_s - 600));
            claims.insert("exp".into(), json!(exp_s));
        })
    };
    assert!(check(&with_iat(NOW_S - 29)).is_ok(), "within the leeway");
    assert_eq!(check(&with_iat(NOW_S - 30)), Err(JwtError::Expired));
    assert_eq!(check(&with_iat(1000)), Err(JwtError::Expired));
    // Expired and something else: invalid.
    assert!(
        matches!(check(&at(NOW_S - 100)), Err(JwtError::Invalid(_))),
        "ends before it starts"
    );
    let expired = with_iat(NOW_S - 100);
    let for_other: Result<Claims, _> = verify(&expired, &[key().public()], "ws_other", NOW_S);
    assert!(matches!(for_other, Err(JwtError::Invalid(_))));
    let by_other: Result<Claims, _> =
        verify(&expired, &[SigningKey::generate().public()], AUD, NOW_S);
    assert!(matches!(by_other, Err(JwtError::Invalid(_))));
    let as_number: Result<u64, _> = verify(&expired, &[key().public()], AUD, NOW_S);
    assert!(matches!(as_number, Err(JwtError::Invalid(_))));
}

#[test]
fn hostile_tokens_are_refused() {
    let good = sign(&key(), &claims());
    let words: Vec<&str> = good.split('.').collect();
    let [head, body, signature] = words[..] else {
        panic!("three words")
    };
    let kid = key().public().key_id();
    let unsigned = |header: &str| format!("{}.{}.", b64(header), body);
    let hs256 = |secret: &[u8]| {
        let text = format!(r#"{{"alg":"HS256","typ":"JWT","kid":"{kid}"}}"#);
        let text = format!("{}.{body}", b64(text));
        format!("{text}.{}", b64(hmac_sha256(secret, text.as_bytes())))
    };
    let public = key().public();
    let other = SigningKey::generate();
    let claims_text = claims().to_string();
    let dup = |extra: &str| signed(header(), format!("{{{extra},{}", &claims_text[1..]));
    let long_ago = NOW_S - 30 * 86_400;

    let hostile: Vec<(&str, String)> = vec![
        // Not a token.
        ("empty", String::new()),
        ("dots", "..".into()),
        ("four dots", "....".into()),
        ("two parts", format!("{head}.{body}")),
        ("four parts", format!("{good}.x")),
        ("five parts (JWE)", format!("{good}.x.y")),
        ("leading space", format!(" {good}")),
        ("trailing newline", format!("{good}\n")),
        ("Bearer", format!("Bearer {good}")),
        ("NUL", format!("{good}\0")),
        ("padding", format!("{head}.{body}=.{signature}")),
        ("signature padded", format!("{good}==")),
        (
            "standard alphabet",
            format!("{head}.{body}.{}", signature.replace(['-', '_'], "+")),
        ),
        (
            "JSON serialisation",
            json!({"payload": body, "signature": signature}).to_string(),
        ),
        // Signature.
        ("no signature", format!("{head}.{body}.")),
        (
            "half a signature",
            format!("{head}.{body}.{}", &signature[..43]),
        ),
        ("zero signature", format!("{head}.{body}.{}", b64([0; 64]))),
        (
            "signature of 65 bytes",
            format!("{head}.{body}.{}", b64([0; 65])),
        ),
        (
            "spare bits set",
            format!("{}{}", &good[..good.len() - 1], spare_bit(&good)),
        ),
        ("another's signature", sign(&other, &claims())),
        ("another's signature under our kid", {
            let text = format!("{head}.{body}");
            format!("{text}.{}", b64(other.sign_raw(text.as_bytes())))
        }),
        ("parts swapped", format!("{body}.{head}.{signature}")),
        ("payload replaced", {
            let mut rich = claims();
            rich["jti"] = json!("t2");
            format!("{head}.{}.{signature}", b64(rich.to_string()))
        }),
        // alg.
        ("alg none", unsigned(r#"{"alg":"none","typ":"JWT"}"#)),
        (
            "alg none with kid",
            unsigned(&format!(r#"{{"alg":"none","typ":"JWT","kid":"{kid}"}}"#)),
        ),
        (
            "alg None, signed",
            with_header(r#"{"alg":"None","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg nOnE",
            unsigned(&format!(r#"{{"alg":"nOnE","typ":"JWT","kid":"{kid}"}}"#)),
        ),
        (
            "alg empty, signed",
            with_header(r#"{"alg":"","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg null, signed",
            with_header(r#"{"alg":null,"typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg array, signed",
            with_header(r#"{"alg":["EdDSA"],"typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg missing, signed",
            with_header(r#"{"typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg eddsa, signed",
            with_header(r#"{"alg":"eddsa","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg Ed25519, signed",
            with_header(r#"{"alg":"Ed25519","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg RS256, signed",
            with_header(r#"{"alg":"RS256","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg PS512, signed",
            with_header(r#"{"alg":"PS512","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "alg ES256, signed",
            with_header(r#"{"alg":"ES256","typ":"JWT","kid":"KID"}"#),
        ),
        ("HS256 by the public key", hs256(public.as_bytes())),
        (
            "HS256 by the public key's hex",
            hs256(public.to_hex().as_bytes()),
        ),
        ("HS256 by nothing", hs256(b"")),
        // Other header fields.
        ("typ missing", with_header(r#"{"alg":"EdDSA","kid":"KID"}"#)),
        (
            "typ at+jwt",
            with_header(r#"{"alg":"EdDSA","typ":"at+jwt","kid":"KID"}"#),
        ),
        (
            "typ jwt",
            with_header(r#"{"alg":"EdDSA","typ":"jwt","kid":"KID"}"#),
        ),
        ("kid missing", with_header(r#"{"alg":"EdDSA","typ":"JWT"}"#)),
        (
            "kid empty",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":""}"#),
        ),
        (
            "kid unknown",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"00000000"}"#),
        ),
        (
            "kid path",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"../../dev/null"}"#),
        ),
        (
            "kid SQL",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"x' OR '1'='1"}"#),
        ),
        (
            "kid number",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":1}"#),
        ),
        (
            "crit",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","crit":["exp"]}"#),
        ),
        (
            "crit empty",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","crit":[]}"#),
        ),
        (
            "b64",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","b64":false}"#),
        ),
        (
            "zip",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","zip":"DEF"}"#),
        ),
        (
            "cty",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","cty":"JWT"}"#),
        ),
        (
            "jku",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","jku":"http://x/"}"#),
        ),
        (
            "jwk",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","jwk":{"kty":"OKP"}}"#),
        ),
        (
            "x5c",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","x5c":[]}"#),
        ),
        (
            "dup alg",
            with_header(r#"{"alg":"none","alg":"EdDSA","typ":"JWT","kid":"KID"}"#),
        ),
        (
            "dup kid",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","kid":"KID"}"#),
        ),
        (
            "dup escaped",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID","\u006bid":"x"}"#),
        ),
        ("header array", with_header(r#"["EdDSA","JWT","KID"]"#)),
        (
            "header trailing",
            with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"KID"}{}"#),
        ),
        ("header empty object", with_header("{}")),
        ("header not UTF-8", signed(b"\xff\xfe{}", &claims_text)),
        (
            "header with BOM",
            signed(format!("\u{feff}{}", header()), &claims_text),
        ),
        // Times.
        ("exp missing", without("exp")),
        ("exp string", set("exp", json!((NOW_S + 600).to_string()))),
        ("exp null", set("exp", Value::Null)),
        ("exp float", set("exp", json!(NOW_S as f64 + 600.5))),
        (
            "exp exponent",
            signed(header(), claims_text.replace("1800000600", "1.8000006e9")),
        ),
        ("exp array", set("exp", json!([NOW_S + 600]))),
        ("exp bool", set("exp", json!(true))),
        ("exp negative", set("exp", json!(-1))),
        ("exp i64::MAX", set("exp", json!(i64::MAX))),
        ("exp u64::MAX", set("exp", json!(u64::MAX))),
        (
            "exp beyond u64",
            signed(header(), claims_text.replace("1800000600", &"9".repeat(30))),
        ),
        ("an hour and a second", set("exp", json!(NOW_S + 3601))),
        ("iat string", set("iat", json!(NOW_S.to_string()))),
        ("iat null", set("iat", Value::Null)),
        ("iat in the future", set("iat", json!(NOW_S + 31))),
        ("iat i64::MIN", set("iat", json!(i64::MIN))),
        ("iat long ago", set("iat", json!(long_ago))),
        (
            "no iat, far exp",
            with_claims(|claims| {
                claims.remove("iat");
                claims.insert("exp".into(), json!(NOW_S + 3601));
            }),
        ),
        ("nbf string", set("nbf", json!(NOW_S.to_string()))),
        ("nbf null", set("nbf", Value::Null)),
        ("nbf in the future", set("nbf", json!(NOW_S + 31))),
        ("expired", set("exp", json!(NOW_S - 31))),
        // Other claims.
        ("aud missing", without("aud")),
        ("aud other", set("aud", json!("ws_ffffffffffffffff"))),
        ("aud prefix", set("aud", json!("ws_0123456789abcde"))),
        ("aud longer", set("aud", json!(format!("{AUD} ")))),
        ("aud upper case", set("aud", json!(AUD.to_uppercase()))),
        ("aud array", set("aud", json!([AUD]))),
        ("aud array of two", set("aud", json!([AUD, "ws_x"]))),
        ("aud null", set("aud", Value::Null)),
        ("aud empty", set("aud", json!(""))),
        ("aud star", set("aud", json!("*"))),
        ("jti missing", without("jti")),
        ("jti empty", set("jti", json!(""))),
        ("jti number", set("jti", json!(1))),
        ("jti null", set("jti", Value::Null)),
        ("dup exp", dup(&format!(r#""exp":{}"#, NOW_S + 600))),
        ("dup aud", dup(r#""aud":"ws_other""#)),
        ("dup aud escaped", dup(r#""\u0061ud":"ws_other""#)),
        ("dup unknown", dup(r#""x":1,"x":2"#)),
        ("dup nested", dup(r#""x":[{"y":1,"y":2}]"#)),
        ("claims array", signed(header(), format!("[{claims_text}]"))),
        (
            "claims string",
            signed(header(), json!(claims_text).to_string()),
        ),
        ("claims null", signed(header(), "null")),
        ("claims empty", signed(header(), "")),
        (
            "claims trailing",
            signed(header(), format!("{claims_text}{{}}")),
        ),
        (
            "claims comment",
            signed(header(), format!("{claims_text}//")),
        ),
        ("claims nested JWT", signed(header(), &good)),
        ("claims deep", signed(header(), "[".repeat(2000))),
        ("claims lone surrogate", dup(r#""x":"\ud800""#)),
        ("too long", set("pad", json!("x".repeat(4096)))),
        ("huge", "A".repeat(10 << 20)),
        (
            "huge parts",
            format!("{}.{}.{}", "A".repeat(1 << 20), body, signature),
        ),
    ];
    assert!(hostile.len() >= 100, "{}", hostile.len());
    for (name, token) in hostile {
        assert_ne!(token, good, "{name}");
        assert!(check(&token).is_err(), "accepted: {name}");
        let _never_panics = peek_aud(&token);
    }
    let no_keys: Result<Claims, _> = verify(&good, &[], AUD, NOW_S);
    assert!(no_keys.is_err());
}

/// The last digit of a token with a bit set that decodes to nothing.
fn spare_bit(token: &str) -> char {
    // 64 bytes are 86 digits; the last carries 2 bits, so it is one of A, Q, g, w.
    match token.chars().last().unwrap() {
        'A' => 'B',
        'Q' => 'R',
        'g' => 'h',
        'w' => 'x',
        other => panic!("{other} can't end a signature"),
    }
}

#[test]
fn two_keys_of_one_id_are_both_tried() {
    // Ids of 32 bits collide; here the same key twice stands for two of one id.
    let keys: Vec<VerifyingKey> = vec![key().public(), key().public()];
    let read: Result<Claims, _> = verify(&sign(&key(), &claims()), &keys, AUD, NOW_S);
    assert!(read.is_ok());
}

proptest! {
    #[test]
    fn any_changed_character_is_refused(at: prop::sample::Index, with in "[ -~]") {
        let good = sign(&key(), &claims());
        let at = at.index(good.len());
        let bad = format!("{}{with}{}", &good[..at], &good[at + 1..]);
        prop_assume!(bad != good);
        prop_assert!(check(&bad).is_err());
        prop_assert!(check(&good[..at]).is_err());
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,80}", head in "[A-Za-z0-9_-]{0,40}", body in "[A-Za-z0-9_-]{0,40}") {
        prop_assert!(check(&text).is_err());
        let token = format!("{head}.{body}.{head}");
        prop_assert!(check(&token).is_err());
        let _never_panics = peek_aud(&token);
    }

    #[test]
    fn times_never_overflow(exp: i64, iat: i64, nbf: i64, now: i64) {
        let token = with_claims(|claims| {
            claims.insert("exp".into(), json!(exp));
            claims.insert("iat".into(), json!(iat));
            claims.insert("nbf".into(), json!(nbf));
        });
        if verify::<Claims>(&token, &[key().public()], AUD, now).is_ok() {
            prop_assert!(exp + 30 > now && iat <= now + 30 && nbf <= now + 30 && exp - iat <= 3600);
        }
    }
}
