//! Prompts for instruct models in the ChatML format.
//!
//! *Helps*: SmolLM2, Qwen and many fine-tunes answer far better when asked in the format they were trained on. *Hurts*: a
//! model with another template gets `None` from [`ChatMl::for_model`]; the Jinja template itself is not interpreted.

use crate::tokenizer::Tokenizer;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// The ChatML format, with the system message that the model's template puts first when the caller gives none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMl {
    default_system: Option<String>,
}

impl ChatMl {
    /// The format if the model's template uses it.
    pub fn for_model(tokenizer: &Tokenizer) -> Option<Self> {
        tokenizer.chat_template().and_then(Self::from_template)
    }

    /// The format if this Jinja template uses it.
    pub fn from_template(template: &str) -> Option<Self> {
        template.contains("<|im_start|>").then(|| Self { default_system: default_system(template) })
    }

    /// Formats a conversation and opens the assistant's turn. Encode the result with
    /// [`crate::SpecialTokens::Recognize`].
    ///
    /// Text in the messages is taken as it is: a message that spells out `<|im_end|>` ends its turn.
    pub fn prompt(&self, messages: &[(Role, &str)]) -> String {
        let mut out = String::new();
        let mut turn = |role: Role, text: &str| {
            out.push_str("<|im_start|>");
            out.push_str(role.name());
            out.push('\n');
            out.push_str(text);
            out.push_str("<|im_end|>\n");
        };
        if let Some(system) = &self.default_system
            && messages.first().is_none_or(|(role, _)| *role != Role::System)
        {
            turn(Role::System, system);
        }
        for (role, text) in messages {
            turn(*role, text);
        }
        out.push_str("<|im_start|>assistant\n");
        out
    }
}

/// Templates spell their default system message as a literal turn; a turn with a Jinja expression in it is not one.
fn default_system(template: &str) -> Option<String> {
    // Inside a Jinja string the line end is either a real one or an escape.
    ["<|im_start|>system\n", "<|im_start|>system\\n"].iter().find_map(|opening| {
        let text = template.split_once(opening)?.1.split_once("<|im_end|>")?.0;
        let literal = !text.is_empty() && !text.contains(['\'', '{', '}', '+']);
        literal.then(|| text.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_closed_and_the_assistants_is_opened() {
        let chat = ChatMl::from_template("{{'<|im_start|>' + message['role']}}").unwrap();
        assert_eq!(
            chat.prompt(&[(Role::User, "Hi"), (Role::Assistant, "Hello"), (Role::User, "Bye")]),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n\
             <|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn the_templates_default_system_message_comes_first_unless_given() {
        for newline in ["\n", "\\n"] {
            let template = format!("{{{{ '<|im_start|>system{newline}Be nice.<|im_end|>{newline}' }}}}");
            let chat = ChatMl::from_template(&template).unwrap();
            assert!(
                chat.prompt(&[(Role::User, "Hi")]).starts_with("<|im_start|>system\nBe nice.<|im_end|>\n")
            );
            assert!(!chat.prompt(&[(Role::System, "Be brief."), (Role::User, "Hi")]).contains("nice"));
        }
    }

    #[test]
    fn other_formats_are_not_chatml() {
        assert_eq!(ChatMl::from_template("[INST] {{ prompt }} [/INST]"), None);
    }
}
