//! Which tensors are cast to which type: rules read from a line of text, `lm_head.*=f32,bf16`.

use super::can_cast;
use crate::{
    dtype::DType,
    error::{Fault, Result},
};
use std::fmt;
use wildmatch::WildMatch;

/// What a rule may name, the usual spelling of each type before its other ones. `None`: the tensor stays as it is.
const NAMES: &[(&str, Option<DType>)] = &[
    ("bf16", Some(DType::BF16)),
    ("bfloat16", Some(DType::BF16)),
    ("f16", Some(DType::F16)),
    ("float16", Some(DType::F16)),
    ("half", Some(DType::F16)),
    ("f32", Some(DType::F32)),
    ("float32", Some(DType::F32)),
    ("f64", Some(DType::F64)),
    ("float64", Some(DType::F64)),
    ("keep", None),
];

/// Which tensors are cast, and to what. The first rule that fits a tensor decides; without one it stays as it is.
///
/// ```
/// use unladen::{DType, cast::Casts};
///
/// let casts = Casts::parse("lm_head.*=f32,bf16")?;
/// assert_eq!(casts.dtype_of("lm_head.weight", DType::F16)?, DType::F32);
/// assert_eq!(casts.dtype_of("h.0.ln_1.weight", DType::F32)?, DType::BF16);
/// assert_eq!(casts.dtype_of("h.0.attn.mask", DType::Bool)?, DType::Bool);
/// # Ok::<(), unladen::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Casts {
    rules: Vec<Rule>,
}

/// Prints as it is written: `*.weight=bf16`.
#[derive(Clone, Debug, PartialEq)]
struct Rule {
    /// `None`: every tensor that can be cast.
    pattern: Option<WildMatch>,
    /// `None`: it stays as it is.
    target: Option<DType>,
}

/// Patterns are compared as text; `WildMatch` just does not say so.
impl Eq for Rule {}

impl Casts {
    /// Every tensor stays as it is.
    pub fn none() -> Casts {
        Casts::default()
    }

    /// Reads rules with commas between them. `bf16` is for every tensor of floating-point numbers of 16, 32 or 64 bits;
    /// `*.weight=bf16` for those whose full name fits the pattern, in which `*` is any run of characters and `?` any one.
    ///
    /// A rule without a pattern leaves nothing to rules behind it, so it is an error if there are any.
    pub fn parse(text: &str) -> Result<Casts> {
        let rules: Vec<Rule> = text.split(',').map(|rule| Rule::parse(rule.trim())).collect::<Result<_>>()?;
        if let Some((_, before)) = rules.split_last()
            && let Some(early) = before.iter().find(|rule| rule.pattern.is_none())
        {
            let found = format!("`{early}` before other rules");
            return Err(Fault::new("the rule for all tensors at the end", found)
                .hint(format!("the first rule that fits decides: move `{early}` behind the others"))
                .mismatch());
        }
        Ok(Casts { rules })
    }

    /// True if no tensor would change.
    pub fn is_nothing(&self) -> bool {
        self.rules.iter().all(|rule| rule.target.is_none())
    }

    /// The type that a tensor will have.
    ///
    /// Rules without a pattern pass over tensors of other types than 64-, 32- and 16-bit floats, as PyTorch's
    /// `module.to(dtype)` does. A pattern that asks for the cast of such a tensor is an error.
    pub fn dtype_of(&self, name: &str, dtype: DType) -> Result<DType> {
        let decides = |rule: &&Rule| match rule.pattern {
            Some(_) => rule.fits(name),
            None => rule.target.is_none_or(|target| can_cast(dtype, target)),
        };
        let Some((rule, target)) =
            self.rules.iter().find(decides).and_then(|rule| Some((rule, rule.target?)))
        else {
            return Ok(dtype);
        };
        if can_cast(dtype, target) {
            return Ok(target);
        }
        Err(Fault::new(
            format!("floating-point numbers of 16, 32 or 64 bits for the rule `{rule}`"),
            dtype.name(),
        )
        .tensor(name)
        .hint(format!(
            "put `{}=keep` before that rule, or write `{}` without a pattern, which leaves other types alone",
            name.escape_debug(),
            type_name(Some(target))
        ))
        .mismatch())
    }

    /// The rules with a pattern that decide about none of these tensors, as they print: no name fits, or an earlier
    /// rule fits them all. Likely a slip of whoever wrote them.
    pub fn unused<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<String> {
        let mut is_used = vec![false; self.rules.len()];
        for name in names {
            if let Some(index) = self.rules.iter().position(|rule| rule.fits(name)) {
                is_used[index] = true;
            }
        }
        let unused =
            |(rule, is_used): (&Rule, bool)| (rule.pattern.is_some() && !is_used).then(|| rule.to_string());
        self.rules.iter().zip(is_used).filter_map(unused).collect()
    }
}

impl Rule {
    fn parse(text: &str) -> Result<Rule> {
        // The last `=`, because a tensor's name may hold one and a type's name does not.
        let (pattern, target) = match text.rsplit_once('=') {
            Some((pattern, target)) => (Some(pattern.trim_end()), target.trim_start()),
            None => (None, text),
        };
        let types = || NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let wrong = |expected: &str, found: String| {
            let hint = format!(
                "write `bf16`, `*.weight=bf16` or several such rules with commas; the types are {}",
                types()
            );
            Fault::new(expected, found).hint(hint).mismatch()
        };
        if text.is_empty() {
            return Err(wrong("a rule of casts", "nothing".into()));
        }
        if pattern == Some("") {
            return Err(wrong("a pattern of tensors' names", format!("none in the rule `{text}`")));
        }
        let Some(&(_, target)) = NAMES.iter().find(|(name, _)| *name == target) else {
            return Err(wrong("a type to cast to", format!("`{target}` in the rule `{text}`")));
        };
        Ok(Rule { pattern: pattern.map(WildMatch::new), target })
    }

    fn fits(&self, name: &str) -> bool {
        self.pattern.as_ref().is_none_or(|pattern| pattern.matches(name))
    }
}

fn type_name(target: Option<DType>) -> &'static str {
    NAMES.iter().find(|(_, it)| *it == target).map_or("", |(name, _)| name)
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(pattern) = &self.pattern {
            write!(f, "{pattern}=")?;
        }
        f.write_str(type_name(self.target))
    }
}

impl fmt::Display for Casts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, rule) in self.rules.iter().enumerate() {
            write!(f, "{}{rule}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use proptest::prelude::*;

    fn parse(text: &str) -> Casts {
        Casts::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// Fails if `text` parses.
    fn error_of(text: &str) -> Error {
        Casts::parse(text).expect_err(text)
    }

    #[test]
    fn without_rules_every_tensor_stays() {
        assert!(Casts::none().is_nothing());
        assert_eq!(Casts::none().to_string(), "");
        for dtype in DType::all() {
            assert_eq!(Casts::none().dtype_of("w", dtype).unwrap(), dtype);
        }
    }

    #[test]
    fn a_rule_without_a_pattern_changes_floating_point_numbers_only() {
        for dtype in DType::all() {
            let is_float = matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16);
            let expected = if is_float { DType::BF16 } else { dtype };
            assert_eq!(parse("bf16").dtype_of("w", dtype).unwrap(), expected);
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let casts = parse("lm_head.*=f32, *.bias=keep, h.?.weight=half, bf16");
        for (name, expected) in [
            ("lm_head.bias", DType::F32),
            ("h.0.bias", DType::F64),
            ("h.0.weight", DType::F16),
            ("h.10.weight", DType::BF16),
        ] {
            assert_eq!(casts.dtype_of(name, DType::F64).unwrap(), expected, "{name}");
        }
        assert_eq!(parse("a=f32").dtype_of("b", DType::F64).unwrap(), DType::F64);
    }

    #[test]
    fn a_pattern_that_asks_for_the_impossible_names_the_tensor() {
        let casts = parse("h.*=bf16");
        let error = casts.dtype_of("h.0.mask", DType::Bool).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `h.0.mask`: expected floating-point numbers of 16, 32 or 64 bits for the rule `h.*=bf16`, \
             found bool"
        );
        assert!(error.hint().contains("`h.0.mask=keep`"), "{}", error.hint());
        let followed = parse("h.0.mask=keep,h.*=bf16");
        assert_eq!(followed.dtype_of("h.0.mask", DType::Bool).unwrap(), DType::Bool);
        assert_eq!(followed.dtype_of("h.0.weight", DType::F32).unwrap(), DType::BF16);
    }

    #[test]
    fn every_name_of_a_type_is_read_and_printed_in_its_usual_spelling() {
        for (name, target) in NAMES {
            let casts = parse(name);
            assert_eq!(casts.dtype_of("w", DType::F32).unwrap(), target.unwrap_or(DType::F32), "{name}");
            assert_eq!(parse(&casts.to_string()), casts, "{name}");
            assert_eq!(casts.is_nothing(), *name == "keep");
        }
        assert_eq!(parse(" a.* = float16 , x=y=half ,bfloat16 ").to_string(), "a.*=f16,x=y=f16,bf16");
    }

    #[test]
    fn what_does_not_parse_is_said_with_the_types() {
        for (text, said) in [
            ("", "found nothing"),
            ("bf16,", "found nothing"),
            ("*.weight=f16,,bf16", "found nothing"),
            ("=bf16", "found none in the rule `=bf16`"),
            ("int8", "found `int8` in the rule `int8`"),
            ("*.weight=", "found `` in the rule `*.weight=`"),
            ("*.weight=BF16", "found `BF16` in the rule `*.weight=BF16`"),
        ] {
            let error = error_of(text);
            assert!(error.to_string().contains(said), "{text}: {error}");
            assert!(error.hint().contains("bf16, bfloat16, f16"), "{text}: {}", error.hint());
        }
    }

    #[test]
    fn a_rule_for_all_tensors_stands_last() {
        for text in ["bf16,lm_head.*=f32", "bf16,f32", "a=f32,keep,b=f16"] {
            let error = error_of(text);
            assert!(error.hint().contains("behind the others"), "{text}: {}", error.hint());
        }
    }

    #[test]
    fn patterns_that_decide_nothing_are_found() {
        let casts = parse("h.*=bf16,h.1.*=f16,wpe*=f32,lm_haed=f32,f16");
        let names = ["h.0.w", "h.1.w", "wpe.weight", "lm_head"];
        assert_eq!(casts.unused(names.into_iter()), ["h.1.*=f16", "lm_haed=f32"]);
        assert_eq!(parse("bf16").unused([].into_iter()), Vec::<String>::new());
    }

    /// What a pattern means, one character at a time.
    fn fits(pattern: &[char], name: &[char]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some(('*', pattern_rest)), _) => {
                fits(pattern_rest, name) || name.split_first().is_some_and(|(_, rest)| fits(pattern, rest))
            }
            (Some((wanted, pattern_rest)), Some((found, rest))) => {
                (*wanted == '?' || wanted == found) && fits(pattern_rest, rest)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_fit_as_their_meaning_says(pattern in "[ab.=é*?]{1,8}", name in "[ab.=é]{0,10}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            let is_cast = parse(&format!("{pattern}=bf16")).dtype_of(&name, DType::F32).unwrap() == DType::BF16;
            prop_assert_eq!(is_cast, fits(&chars(&pattern), &chars(&name)));
        }

        #[test]
        fn what_is_printed_parses_to_the_same_rules(
            rules in proptest::collection::vec("[a-c.*?]{1,6}=(bf16|half|float32|f64|keep)", 0..4),
            last in "f16|bfloat16|keep",
        ) {
            let casts = parse(&[rules, vec![last]].concat().join(","));
            prop_assert_eq!(parse(&casts.to_string()), casts);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-c=,*? bf16]{0,20}|\\PC{0,20}") {
            if let Ok(casts) = Casts::parse(&text) {
                prop_assert_eq!(parse(&casts.to_string()), casts);
            }
        }
    }
}
