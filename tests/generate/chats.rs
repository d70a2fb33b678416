//! Chat templates against transformers.

use mamba_generate::ChatTemplate;

use crate::support::golden::{Golden, path};
use crate::support::tolerance::values;

#[test]
fn texts_equal_those_of_transformers() {
    let golden = Golden::read(&path("generate/chat_templates.safetensors"));
    let cases: Vec<serde_json::Value> = serde_json::from_str(golden.option("cases").unwrap()).unwrap();
    assert_eq!(values(&golden.tensors["count"]), [cases.len() as f64]);
    let (mut rendered, mut refused) = (0, 0);
    for case in &cases {
        let template = ChatTemplate::new(case["template"].as_str().unwrap()).unwrap();
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let text = template.render_with(&case["messages"], add_generation_prompt, &case["variables"]);
        match case["text"].as_str() {
            Some(expected) => {
                assert_eq!(text.unwrap(), expected, "{case:#}");
                rendered += 1;
            }
            None => {
                let error = text.unwrap_err();
                let words = std::error::Error::source(&error).unwrap().to_string();
                assert!(words.contains(case["error"].as_str().unwrap()), "{words}");
                refused += 1;
            }
        }
    }
    assert_eq!((rendered, refused), (22, 2));
}
