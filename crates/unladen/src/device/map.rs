//! Which tensors go to which device: rules read from a line of text, `trf_blocks.0-23=cuda:0,*=cuda:1`.

use super::Device;
use crate::error::{Error, Fault};
use std::{fmt, str::FromStr};

/// Which tensors go to which device. The first rule that fits a tensor decides; without one it goes where the load goes.
///
/// A pattern fits a tensor's whole name, or the name of a module that the tensor is in: `trf_blocks.3` fits
/// `trf_blocks.3.att.W_query.weight`, and not `trf_blocks.30.norm1.scale`. In it `*` is any run of characters, `?` any one,
/// and a part between dots that is two numbers, `0-23`, any number from the one to the other.
///
/// ```
/// use unladen::{Device, DeviceMap};
///
/// let map: DeviceMap = "trf_blocks.0-23=cuda:0,tok_emb=host,*=cuda:1".parse()?;
/// assert_eq!(map.device_of("trf_blocks.7.norm1.scale"), Some(Device::Cuda(0)));
/// assert_eq!(map.device_of("tok_emb.weight"), Some(Device::Host));
/// assert_eq!(map.device_of("trf_blocks.24.norm1.scale"), Some(Device::Cuda(1)));
/// # Ok::<(), unladen::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMap {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// As it was written.
    pattern: String,
    signs: Vec<Sign>,
    device: Device,
}

/// What a pattern is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    One(char),
    AnyOne,
    AnyRun,
    Number(u64, u64),
}

impl DeviceMap {
    /// Where the rules send a tensor; `None`: no rule fits its name.
    pub fn device_of(&self, name: &str) -> Option<Device> {
        self.rules.iter().find(|rule| rule.fits(name)).map(|rule| rule.device)
    }

    /// True without rules.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Every device that a rule names.
    pub fn devices(&self) -> impl Iterator<Item = Device> {
        self.rules.iter().map(|rule| rule.device)
    }

    /// The rules that decide about none of these tensors, as they were written.
    pub fn unused<'n>(&self, names: impl Iterator<Item = &'n str>) -> Vec<String> {
        let mut is_used = vec![false; self.rules.len()];
        for name in names {
            if let Some(index) = self.rules.iter().position(|rule| rule.fits(name)) {
                is_used[index] = true;
            }
        }
        let unused = self.rules.iter().zip(is_used).filter(|(_, is_used)| !is_used);
        unused.map(|(rule, _)| rule.to_string()).collect()
    }
}

impl fmt::Display for DeviceMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules: Vec<String> = self.rules.iter().map(Rule::to_string).collect();
        f.write_str(&rules.join(","))
    }
}

impl FromStr for DeviceMap {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceMap, Error> {
        let rules = text.split(',').map(|rule| Rule::parse(rule.trim())).collect::<Result<_, Error>>()?;
        Ok(DeviceMap { rules })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pattern, self.device)
    }
}

impl Rule {
    fn parse(text: &str) -> Result<Rule, Error> {
        let Some((pattern, device)) = text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty()) else {
            return Err(Fault::new("a rule, `PATTERN=DEVICE`", format!("`{text}`"))
                .hint("for example --device-map 'trf_blocks.0-23=cuda:0,*=cuda:1'")
                .mismatch());
        };
        let mut signs = Vec::new();
        for (index, part) in pattern.split('.').enumerate() {
            if index > 0 {
                signs.push(Sign::One('.'));
            }
            match numbers(part) {
                Some((first, last)) if first > last => {
                    let fault = Fault::new("the smaller number first", format!("`{part}` in `{text}`"));
                    return Err(fault.hint(format!("write `{last}-{first}`")).mismatch());
                }
                Some((first, last)) => signs.push(Sign::Number(first, last)),
                None => signs.extend(part.chars().map(|it| match it {
                    '*' => Sign::AnyRun,
                    '?' => Sign::AnyOne,
                    it => Sign::One(it),
                })),
            }
        }
        Ok(Rule { pattern: pattern.to_owned(), signs, device: device.parse()? })
    }

    /// Walks the name with all places in the pattern at once: as long as both are, whatever stars there are.
    fn fits(&self, name: &str) -> bool {
        let chars: Vec<char> = name.chars().collect();
        // Where in the name the signs so far can end.
        let mut ends = vec![false; chars.len() + 1];
        ends[0] = true;
        for sign in &self.signs {
            let mut next = vec![false; chars.len() + 1];
            for at in (0..=chars.len()).filter(|&at| ends[at]) {
                match *sign {
                    Sign::One(wanted) if chars.get(at) == Some(&wanted) => next[at + 1] = true,
                    Sign::AnyOne if at < chars.len() => next[at + 1] = true,
                    Sign::AnyRun => next[at..].fill(true),
                    Sign::Number(first, last) => {
                        let len = chars[at..].iter().take_while(|it| it.is_ascii_digit()).count();
                        let number: String = chars[at..at + len].iter().collect();
                        if number.parse().is_ok_and(|it: u64| (first..=last).contains(&it)) {
                            next[at + len] = true;
                        }
                    }
                    Sign::One(_) | Sign::AnyOne => {}
                }
            }
            ends = next;
        }
        // The whole name, or a module's.
        ends[chars.len()] || (0..chars.len()).any(|at| ends[at] && chars[at] == '.')
    }
}

/// `0-23`.
fn numbers(part: &str) -> Option<(u64, u64)> {
    let (first, last) = part.split_once('-')?;
    let is_number = |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit());
    (is_number(first) && is_number(last)).then_some((first.parse().ok()?, last.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device_of(map: &str, name: &str) -> Option<Device> {
        map.parse::<DeviceMap>().unwrap().device_of(name)
    }

    #[test]
    fn a_pattern_is_for_a_module_or_for_a_whole_name() {
        let map = "h.0-11=cuda:0,wte.weight=host,h.*.attn=cuda:1,??_f=cuda:2";
        for (name, device) in [
            ("h.0.ln_1.weight", Some(Device::Cuda(0))),
            ("h.11.attn.c_attn.weight", Some(Device::Cuda(0))),
            ("h.12.attn.c_attn.weight", Some(Device::Cuda(1))),
            ("h.12.mlp.c_fc.weight", None),
            ("h.1x.mlp", None),
            ("h.011.mlp", Some(Device::Cuda(0))),
            ("wte.weight", Some(Device::Host)),
            ("wte.weights", None),
            ("wte", None),
            ("ln_f.bias", Some(Device::Cuda(2))),
            ("", None),
        ] {
            assert_eq!(device_of(map, name), device, "{name}");
        }
        assert_eq!(device_of("*=cuda", ""), Some(Device::Cuda(0)));
        assert_eq!(device_of("ä*=cuda", "äö.ü"), Some(Device::Cuda(0)));
    }

    #[test]
    fn stars_in_long_names_take_no_time() {
        let (pattern, name) = ("*a".repeat(40) + "b=cuda", "a".repeat(512));
        assert_eq!(device_of(&pattern, &name), None);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in ["", "h.0", "=cuda:0", "h=", "h=gpu", "h.9-3=cuda", "h=cuda,,"] {
            assert!(text.parse::<DeviceMap>().is_err(), "{text}");
        }
    }

    #[test]
    fn rules_that_decide_about_nothing_are_told() {
        let map: DeviceMap = "h.0=cuda:0,x=host,*=cuda:1".parse().unwrap();
        assert_eq!(map.unused(["h.0.w", "h.1.w"].into_iter()), ["x=host"]);
        assert_eq!(map.to_string(), "h.0=cuda:0,x=host,*=cuda:1");
    }
}
