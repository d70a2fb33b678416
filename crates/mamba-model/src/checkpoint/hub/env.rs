//! The environment variables of Python's huggingface_hub, with the same meaning and precedence.

use std::path::PathBuf;

/// What the environment says about the Hub.
#[derive(Default)]
pub(super) struct Settings {
    pub endpoint: Option<String>,
    /// `None` if there is neither a variable for it nor a home folder.
    pub cache_dir: Option<PathBuf>,
    pub token: Option<String>,
    pub offline: bool,
}

impl Settings {
    /// Reads the variables through `var`; only the token's file is read from disk.
    pub fn read(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| var(name));
        let path = |text: String| expand(&text, &var);

        let home = first(&["HF_HOME"]).map(path).or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            Some(cache.or_else(|| Some(user_home(&var)?.join(".cache")))?.join("huggingface"))
        });
        let cache_dir = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map(path);
        let token_file = var("HF_TOKEN_PATH").map(path).or_else(|| Some(home.as_ref()?.join("token")));
        let token = || {
            let given = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).and_then(|token| clean(&token));
            given.or_else(|| clean(&std::fs::read_to_string(token_file?).ok()?))
        };
        let is_set = |name| var(name).is_some_and(|value| is_true(&value));
        Self {
            endpoint: var("HF_ENDPOINT"),
            cache_dir: cache_dir.or_else(|| Some(home?.join("hub"))),
            token: if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token() },
            offline: first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]).is_some_and(|value| is_true(&value)),
        }
    }
}

fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

/// A token without the line end that files and secret stores add, or `None` if nothing is left.
fn clean(token: &str) -> Option<String> {
    let token = token.replace(['\r', '\n'], "");
    let token = token.trim();
    (!token.is_empty()).then(|| token.to_string())
}

fn user_home(var: &impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    var("HOME").or_else(|| var("USERPROFILE")).map(PathBuf::from)
}

/// Replaces a leading `~`, then `$NAME` and `${NAME}`, as Python does for these variables; unknown names stay.
fn expand(text: &str, var: &impl Fn(&str) -> Option<String>) -> PathBuf {
    let below_home = if text == "~" { Some("") } else { text.strip_prefix("~/") };
    if let Some((below, home)) = below_home.zip(user_home(var)) {
        return home.join(expand_names(below, var));
    }
    PathBuf::from(expand_names(text, var))
}

fn expand_names(text: &str, var: &impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, length) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        let known = (!name.is_empty()).then(|| var(name)).flatten();
        out.push_str(&known.unwrap_or_else(|| format!("${}", &after[..length])));
        rest = &after[length..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Settings {
        Settings::read(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    fn cache(vars: &[(&str, &str)]) -> String {
        let path = read(vars).cache_dir.unwrap();
        path.to_str().unwrap().replace('\\', "/")
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let home = ("HOME", "/home/u");
        assert_eq!(cache(&[home]), "/home/u/.cache/huggingface/hub");
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")]), "/h/hub");
        assert_eq!(cache(&[home, ("HF_HOME", "~/hf")]), "/home/u/hf/hub");
        assert_eq!(cache(&[home, ("HF_HOME", "$HOME/a-${HOME}/$NOBODY")]), "/home/u/a-/home/u/$NOBODY/hub");
        assert_eq!(cache(&[home, ("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), "/new");
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", "")]), "/home/u/.cache/huggingface/hub");
        assert_eq!(read(&[]).cache_dir, None);
    }

    #[test]
    fn the_token_comes_from_the_variable_then_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let (file, home) = (folder.path().join("secret"), folder.path().to_str().unwrap());
        std::fs::write(folder.path().join("token"), "hf_home\n").unwrap();
        std::fs::write(&file, " hf_file \r\n").unwrap();
        let (home, file) = (("HF_HOME", home), ("HF_TOKEN_PATH", file.to_str().unwrap()));
        let token = |vars: &[(&str, &str)]| read(vars).token;
        assert_eq!(token(&[home]).as_deref(), Some("hf_home"));
        assert_eq!(token(&[home, file]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[home, file, ("HUGGING_FACE_HUB_TOKEN", "hf_old")]).as_deref(), Some("hf_old"));
        assert_eq!(token(&[home, file, ("HF_TOKEN", "hf_var\n")]).as_deref(), Some("hf_var"));
        assert_eq!(token(&[home, ("HF_TOKEN", "x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert_eq!(token(&[("HF_HOME", "/nowhere")]), None);
    }

    #[test]
    fn offline_and_endpoint() {
        for (value, expected) in
            [("1", true), ("on", true), ("Yes", true), ("TRUE", true), ("0", false), ("2", false)]
        {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value}");
        }
        assert!(read(&[("TRANSFORMERS_OFFLINE", "1")]).offline && !read(&[]).offline);
        assert_eq!(read(&[("HF_ENDPOINT", "http://h")]).endpoint.as_deref(), Some("http://h"));
    }
}
